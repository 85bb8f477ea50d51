complete -c socket-proxyd -l listen -d 'Open [udp:][HOST:]PORT, [dgram:]/path, @name, vsock:CID:PORT' -r -F
complete -c socket-proxyd -s c -l connections-max -d 'Serve up to N connections at a time' -r
complete -c socket-proxyd -l connections-max-per-source -d 'Serve up to N of them from one IPv4 address or IPv6 /64' -r
complete -c socket-proxyd -l overflow -d 'Refuse others, or let them wait' -r -f -a "refuse\t'Accept and close them'
wait\t'Leave them queued in the kernel until a connection ends'"
complete -c socket-proxyd -l wake-on -d 'Serve at once, or from the first byte on' -r -f -a "connect\t'From accept on'
data\t'From its first byte on'"
complete -c socket-proxyd -l passive-from -d 'Clients that start and postpone nothing: 10.0.0.0/8, unix' -r
complete -c socket-proxyd -l exit-idle-time -d 'Exit after TIME without a connection' -r
complete -c socket-proxyd -l drain-time -d 'When stopped, give open connections TIME to end' -r
complete -c socket-proxyd -l handover -d 'Keep connections over a restart or a crash' -r -f -a "never\t''
restart\t'A stop of the process'
crash\t'Any end of the process, SIGKILL included'"
complete -c socket-proxyd -l backend-wait -d 'Hold clients until TARGET is up [default: 0; on demand: 90s]' -r
complete -c socket-proxyd -l connect-timeout -d 'Give up on one address of TARGET after TIME' -r
complete -c socket-proxyd -l connection-idle-time -d 'Close connections idle for TIME' -r
complete -c socket-proxyd -l session-idle-time -d 'End datagram sessions idle for TIME' -r
complete -c socket-proxyd -l keepalive -d 'Probe TCP peers silent for TIME' -r
complete -c socket-proxyd -l proxy-protocol -d 'Tell TARGET the client\'s address' -r -f -a "v1\t'One line of text, at most 107 bytes'
v2\t'Binary, at most 232 bytes here'"
complete -c socket-proxyd -l source -d 'Choose whose IP address TARGET sees' -r -f -a "proxy\t'The proxy\'s'
client\t'The client\'s IP address'"
complete -c socket-proxyd -l ready -d 'Ready on connect (the default), notify, http:PATH or exec:LINE' -r -f -a "connect\t''
notify\t''
http:/\t''
exec:\t''"
complete -c socket-proxyd -l start-command -d 'Run LINE for the first client, such as docker start web' -r
complete -c socket-proxyd -l stop-command -d 'Run LINE when idle for --stop-idle-time=' -r
complete -c socket-proxyd -l freeze-idle-time -d 'Freeze COMMAND when idle for TIME [default: infinity]' -r
complete -c socket-proxyd -l stop-idle-time -d 'Stop COMMAND when idle for TIME [default: infinity]' -r
complete -c socket-proxyd -l busy -d 'Let COMMAND say that it is busy' -r -f -a "no\t'Not at all'
notify\t'By notifications'"
complete -c socket-proxyd -l min-run-time -d 'Keep COMMAND running for TIME once it is ready [default: 0]' -r
complete -c socket-proxyd -l threads -d 'Serve with up to N threads, 1 to 256' -r
complete -c socket-proxyd -l metrics -d 'Answer Prometheus there, or at the passed socket fd:NAME' -r -F
complete -c socket-proxyd -l log-level -d 'Log err, warning, notice, info or debug [default: info]' -r -f -a "err\t''
warning\t''
notice\t''
info\t''
debug\t''"
complete -c socket-proxyd -s h -l help -d 'Show this help'
complete -c socket-proxyd -l version -d 'Show the version'
