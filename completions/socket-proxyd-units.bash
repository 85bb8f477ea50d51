# bash completion for socket-proxyd-units(8)

_socket_proxyd_units() {
    local cur prev words cword split
    # With its value behind a "=", as a word of its own.
    _init_completion -n : -s || return

    # COMMAND and its arguments; among the words as they are split at : and =.
    local before
    for ((before = 2; before < COMP_CWORD; before++)); do
        if [[ ${COMP_WORDS[before]} == -- ]]; then
            _command_offset $((before + 1))
            return
        fi
    done

    case $prev in
        --listen | --target | --metrics)
            _filedir
            return
            ;;
        --write)
            # As a word of its own it would be NAME, but for a path.
            if [[ $split == true || $cur == [./]* ]]; then
                _filedir -d
                return
            fi
            ;;
        --service)
            COMPREPLY=($(compgen -W "$(systemctl list-unit-files --no-legend --type=service \
                2>/dev/null | while read -r unit _; do printf '%s\n' "$unit"; done)" -- "$cur"))
            return
            ;;
        --idle)
            COMPREPLY=($(compgen -W '30s 10min 1h infinity' -- "$cur"))
            return
            ;;
        --user)
            COMPREPLY=($(compgen -u -- "$cur"))
            return
            ;;
        --group)
            COMPREPLY=($(compgen -g -- "$cur"))
            return
            ;;
    esac

    if [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W '--listen= --target= --service= --idle= --user= --group= --metrics=
            --write --force --help --version' -- "$cur"))
        [[ ${COMPREPLY-} == *= ]] && compopt -o nospace
    fi
} && complete -F _socket_proxyd_units socket-proxyd-units
