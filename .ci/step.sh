# step COMMAND...: say what runs, run it, say how long it took. To be sourced.
step() {
    local start=$SECONDS
    printf '\n── %s\n' "$*"
    "$@"
    printf '── %s s\n' "$((SECONDS - start))"
}
