# A datagram application that knows nothing of activation, for the tests of COMMAND.
#
# app.pl TARGET LOG [NAME=VALUE ...]: writes "started PID" to LOG at once, and binds TARGET (ADDRESS:PORT
# or a path) after `up` seconds. It writes each datagram to LOG and answers with its pid, a space, and
# the datagram. `down`: it keeps its socket for so long after SIGTERM, and reads no more. `exit`: it
# exits at once. `tcp`: it greets connections to TARGET as well. `ready`: so many seconds after it is
# bound it sends READY=1.
use strict;
use warnings;
use IO::Socket::INET;
use IO::Socket::UNIX;
use Socket;

my ($target, $log, %set) = (shift, shift, map { split /=/, $_, 2 } @ARGV);
sub note { open my $file, '>>', $log or die "$log: $!"; syswrite $file, "$_[0]\n"; close $file }

note("started $$");
$SIG{TERM} = sub {
    note("asked $$");
    select undef, undef, undef, $set{down} if $set{down};
    exit;
};
exit 1 if $set{exit};
select undef, undef, undef, $set{up} if $set{up};
unlink $target if $target =~ m{^/};
my $socket = $target =~ m{^/}
    ? IO::Socket::UNIX->new(Local => $target, Type => SOCK_DGRAM)
    : IO::Socket::INET->new(LocalAddr => $target, Proto => 'udp');
$socket or die "bind $target: $!";
if ($set{tcp}) {
    my $listener = IO::Socket::INET->new(LocalAddr => $target, Listen => 16, ReuseAddr => 1)
        or die "listen on $target: $!";
    if (!fork) {
        $SIG{TERM} = 'DEFAULT';
        my @clients;
        while (my $client = $listener->accept) {
            syswrite $client, "hello";
            push @clients, $client;
        }
        exit;
    }
}
if (defined $set{ready}) {
    select undef, undef, undef, $set{ready} if $set{ready};
    socket my $notify, AF_UNIX, SOCK_DGRAM, 0 or die;
    send $notify, 'READY=1', 0, pack_sockaddr_un($ENV{NOTIFY_SOCKET}) or die "notify: $!";
}
while (1) {
    my $from = recv $socket, my $datagram, 65536, 0;
    defined $from or next;
    note("got $datagram");
    send $socket, "$$ $datagram", 0, $from if length $from;
}
