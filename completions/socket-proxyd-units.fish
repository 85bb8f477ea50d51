# fish completion for socket-proxyd-units(8)

complete -c socket-proxyd-units -f
complete -c socket-proxyd-units -l listen -r -d 'What clients know: PORT, IP:PORT, /path...'
complete -c socket-proxyd-units -l target -r -d 'Where connections go'
complete -c socket-proxyd-units -l service -x -a '(__fish_systemctl_services)' -d 'Start this service for the first client'
complete -c socket-proxyd-units -l idle -x -a '30s 10min 1h infinity' -d 'Stop it after TIME without clients'
complete -c socket-proxyd-units -l user -x -a '(__fish_complete_users)' -d 'Run the proxy as USER'
complete -c socket-proxyd-units -l group -x -a '(__fish_complete_groups)' -d 'Be in GROUP'
complete -c socket-proxyd-units -l metrics -r -d 'Answer Prometheus there'
complete -c socket-proxyd-units -l write -d 'Write the units, do not print them'
complete -c socket-proxyd-units -l force -d 'Even over files of others'
complete -c socket-proxyd-units -s h -l help -d 'Show a summary of the options'
complete -c socket-proxyd-units -l version -d 'Show the version'
