# bash completion for socket-proxyd(8)

_socket_proxyd() {
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
        --overflow)
            COMPREPLY=($(compgen -W 'refuse wait' -- "$cur"))
            return
            ;;
        --handover)
            COMPREPLY=($(compgen -W 'never restart crash' -- "$cur"))
            return
            ;;
        --proxy-protocol)
            COMPREPLY=($(compgen -W 'v1 v2' -- "$cur"))
            return
            ;;
        --ready)
            COMPREPLY=($(compgen -W 'connect notify' -- "$cur"))
            return
            ;;
        --log-level)
            COMPREPLY=($(compgen -W 'err warning notice info debug' -- "$cur"))
            return
            ;;
        --exit-idle-time | --drain-time | --backend-wait | --connect-timeout | \
            --connection-idle-time | --keepalive | --stop-idle-time)
            COMPREPLY=($(compgen -W '30s 5min 1h infinity' -- "$cur"))
            return
            ;;
        --listen | --metrics)
            _filedir
            return
            ;;
        --connections-max | -c | --threads)
            return
            ;;
    esac

    if [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W '--listen= --connections-max= --overflow= --exit-idle-time=
            --drain-time= --handover= --backend-wait= --connect-timeout=
            --connection-idle-time= --keepalive= --proxy-protocol= --ready= --stop-idle-time=
            --threads= --metrics= --log-level= --help --version' -- "$cur"))
        [[ ${COMPREPLY-} == *= ]] && compopt -o nospace
        return
    fi
    # A Unix socket as TARGET; hosts can't be guessed.
    _filedir
} && complete -F _socket_proxyd socket-proxyd
