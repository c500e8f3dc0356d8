# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Checkpoints that run code when they are unpickled, and a server that hands files out."""
import functools
import http.server
import os
import threading
from contextlib import contextmanager

import torch


class Touch:
    """Unpickling makes a file, by a function of the operating system's module."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path), )


def write_malicious(path, marker, zipped=True):
    """Write a checkpoint that makes the folder ``marker`` when it is unpickled, and prove it."""
    torch.save(dict(state_dict={}, meta=Touch(marker)), str(path),
               _use_new_zipfile_serialization=zipped)
    torch.load(str(path), weights_only=False)
    assert marker.is_dir()
    marker.rmdir()
    return path


class _Quiet(http.server.SimpleHTTPRequestHandler):

    def log_message(self, *args):
        """Print nothing."""


@contextmanager
def served(folder):
    """Serve a folder on this machine; yield its address without a slash at the end."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f'http://127.0.0.1:{server.server_address[1]}'
        finally:
            server.shutdown()
            thread.join()
