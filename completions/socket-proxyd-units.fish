complete -c socket-proxyd-units -l listen -d 'PORT, IP:PORT, /path, @name, vsock:CID:PORT, udp:PORT, dgram:/path' -r -F
complete -c socket-proxyd-units -l target -d 'Where connections go; repeatable as SELECTOR=TARGET' -r -F
complete -c socket-proxyd-units -l service -d 'Start this service for the first connection' -r
complete -c socket-proxyd-units -l start-command -d 'Start the backend with LINE, such as docker start web' -r -f -a "(__fish_complete_command)"
complete -c socket-proxyd-units -l stop-command -d 'Stop it with LINE' -r -f -a "(__fish_complete_command)"
complete -c socket-proxyd-units -l ready -d 'Ready on connect (the default), notify, http:PATH or exec:LINE' -r
complete -c socket-proxyd-units -l freeze-idle-time -d 'Freeze COMMAND when idle for TIME [default: infinity]' -r
complete -c socket-proxyd-units -l idle -d 'Stop the backend when idle for TIME [default: infinity]' -r
complete -c socket-proxyd-units -l busy -d 'Let COMMAND say that it is busy: no (the default) or notify' -r
complete -c socket-proxyd-units -l min-run-time -d 'Neither freeze nor stop the backend in its first TIME [default: 0]' -r
complete -c socket-proxyd-units -l user -d 'Run the proxy and COMMAND as USER [default: a transient user]' -r -f -a "(__fish_complete_users)"
complete -c socket-proxyd-units -l group -d 'Add the proxy to GROUP, for the target\'s Unix socket or a command' -r
complete -c socket-proxyd-units -l metrics -d 'Answer Prometheus at ADDRESS, from a socket unit of its own' -r -F
complete -c socket-proxyd-units -l wake-on -d 'Serve at once, or from the first byte on [default: connect]' -r
complete -c socket-proxyd-units -l passive-from -d 'Clients that start and postpone nothing: 10.0.0.0/8, unix' -r
complete -c socket-proxyd-units -l connections-max-per-source -d 'Serve up to N connections from one IPv4 address or IPv6 /64' -r
complete -c socket-proxyd-units -l source -d 'Whose IP address the backend sees [default: proxy]' -r
complete -c socket-proxyd-units -l write -d 'Write to DIR instead of printing [default: /etc/systemd/system]' -r -f -a "(__fish_complete_directories)"
complete -c socket-proxyd-units -l isolate -d 'Run the backend in a network namespace that only the proxy reaches'
complete -c socket-proxyd-units -l force -d 'Replace files that were edited or that this program did not write'
complete -c socket-proxyd-units -s h -l help -d 'Show this help'
complete -c socket-proxyd-units -l version -d 'Show the version'
