# Steps of a script that say what they do and how far they are; to be sourced.
#
# LOG is the file that gets the output of their commands. Every TELL_EVERY seconds a running step
# says how far it is, as far as its output tells: files compiled, or what pip is at.

TELL_EVERY=${TELL_EVERY:-20}

say() { printf '[env] %s\n' "$*"; }

# The newest line of the log from byte $1 on that says how far a step is; '' if there is none.
how_far() {
    tail -c "+$1" "$LOG" | tr '\r' '\n' | awk '
        match($0, /^ *\[[0-9]+\/[0-9]+\]/) {  # of ninja
            split(substr($0, RSTART, RLENGTH), part, /[^0-9]+/)
            line = part[2] " of " part[3] " files compiled"
        }
        /^ *(Collecting|Downloading|Using cached|Building wheel|Installing) / {  # of pip
            sub(/^ */, ""); sub(/https?:[^ ]*\//, ""); line = substr($0, 1, 90)
        }
        END { print line }'
}

# Says how far the step that began at byte $1 of the log is, until it or this script ends.
_tell() {
    local begun=$SECONDS told=$SECONDS where
    while sleep 1 && kill -0 $$ 2>/dev/null; do
        if ((SECONDS - told >= TELL_EVERY)); then
            told=$SECONDS
            where=$(how_far "$1")
            say "    after $((told - begun)) s${where:+: $where}"
        fi
    done
}

# step TEXT COMMAND...: runs a program; if it fails, shows the end of its output and names the log.
step() {
    local text=$1 status=0 teller
    shift
    say "$text"
    printf '\n[env] %s\n+ %s\n' "$text" "$*" >>"$LOG"
    _tell $(($(wc -c <"$LOG") + 1)) &
    teller=$!
    "$@" >>"$LOG" 2>&1 || status=$?
    kill "$teller" 2>/dev/null || true
    wait "$teller" 2>/dev/null || true
    if ((status)); then
        tail -n 25 "$LOG" >&2
        printf '[env] FAILED: %s. The whole output is in %s\n' "$text" "$LOG" >&2
        return "$status"
    fi
}
