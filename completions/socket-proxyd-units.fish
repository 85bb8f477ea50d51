complete -c socket-proxyd-units -l listen -d 'PORT, IP:PORT, /path, @abstract or vsock:CID:PORT; repeatable' -r -F
complete -c socket-proxyd-units -l target -d 'Where connections go; repeatable as SELECTOR=TARGET' -r -F
complete -c socket-proxyd-units -l service -d 'Start this service for the first connection' -r
complete -c socket-proxyd-units -l idle -d 'Stop it, or COMMAND, after TIME without a connection [default: infinity]' -r
complete -c socket-proxyd-units -l user -d 'Run the proxy, and COMMAND, as USER [default: a dynamic user]' -r -f -a "(__fish_complete_users)"
complete -c socket-proxyd-units -l group -d 'Add the proxy to GROUP, which may use the target\'s Unix socket' -r
complete -c socket-proxyd-units -l metrics -d 'Answer Prometheus there, from a socket unit of its own' -r -F
complete -c socket-proxyd-units -l write -d 'Write to DIR instead of printing [default: /etc/systemd/system]' -r -f -a "(__fish_complete_directories)"
complete -c socket-proxyd-units -l force -d 'Replace files that this program has not written, too'
complete -c socket-proxyd-units -s h -l help -d 'Show this help'
complete -c socket-proxyd-units -l version -d 'Show the version'
