complete -c socket-proxyd-units -l listen -d 'PORT, IP:PORT, /path, @abstract or vsock:CID:PORT; repeatable' -r -F
complete -c socket-proxyd-units -l target -d 'Where connections go; repeatable as SELECTOR=TARGET' -r -F
complete -c socket-proxyd-units -l service -d 'Start this service for the first connection' -r
complete -c socket-proxyd-units -l idle -d 'Stop the service or COMMAND when idle for TIME [default: infinity]' -r
complete -c socket-proxyd-units -l user -d 'Run the proxy and COMMAND as USER [default: a transient user]' -r -f -a "(__fish_complete_users)"
complete -c socket-proxyd-units -l group -d 'Add the proxy to GROUP, which may connect to the target\'s Unix socket' -r
complete -c socket-proxyd-units -l metrics -d 'Answer Prometheus at ADDRESS, from a socket unit of its own' -r -F
complete -c socket-proxyd-units -l write -d 'Write to DIR instead of printing [default: /etc/systemd/system]' -r -f -a "(__fish_complete_directories)"
complete -c socket-proxyd-units -l force -d 'Replace files that were edited or that this program did not write'
complete -c socket-proxyd-units -s h -l help -d 'Show this help'
complete -c socket-proxyd-units -l version -d 'Show the version'
