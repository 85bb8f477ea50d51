# An application that knows nothing of activation, for the tests of COMMAND.
#
# app.pl TARGET LOG [NAME=VALUE ...]: writes "started PID" to LOG at once, listens on TARGET (a port
# or a path) after `up` seconds, and after SIGTERM goes on serving for `down` seconds. Each line it is
# sent is answered with a line. `ready` seconds after it listens it sends READY=1, when that is given;
# until then it answers "not ready". `keep=1`: SIGTERM is ignored. `fork=1`: serves from a child that
# the parent waits for. `stray=1`: leaves a child in a session of its own, whose pid goes to LOG.
use strict;
use warnings;
use IO::Select;
use IO::Socket::INET;
use IO::Socket::UNIX;
use POSIX ();
use Socket;

my ($target, $log, %set) = (shift, shift, map { split /=/, $_, 2 } @ARGV);
sub note { open my $file, '>>', $log or die "$log: $!"; syswrite $file, "$_[0]\n"; close $file }
sub wait_for { select undef, undef, undef, $_[0] if $_[0] }

if ($set{stray} && !fork) {
    POSIX::setsid();
    note("stray $$");
    sleep 600;
    exit;
}
if ($set{fork} && (my $child = fork)) {
    note("parent $$");
    $SIG{TERM} = 'IGNORE';
    waitpid $child, 0;
    exit;
}
note("started $$");
my $end;
$SIG{TERM} = $set{keep} ? 'IGNORE' : sub { note("asked $$"); $end //= time_now() + ($set{down} // 0) };
sub time_now { my ($s) = POSIX::times(); $s / POSIX::sysconf(POSIX::_SC_CLK_TCK()) }

wait_for($set{up});
exit if $end && !$set{down};
unlink $target if $target =~ m{^/};
my $listener = $target =~ m{^/}
    ? IO::Socket::UNIX->new(Local => $target, Listen => 512)
    : IO::Socket::INET->new(LocalAddr => "127.0.0.1:$target", Listen => 512, ReuseAddr => 1);
$listener or die "listen on $target: $!";
my $ready = defined $set{ready} ? time_now() + $set{ready} : undef;
my $is_ready = !defined $ready;

sub notify {
    socket my $notify, AF_UNIX, SOCK_DGRAM, 0 or die;
    send $notify, $_[0], 0, pack_sockaddr_un($ENV{NOTIFY_SOCKET}) or die "notify: $!";
}

sub answer {
    return "not ready" unless $is_ready;
    return $$ if $_[0] eq 'pid';
    return notify("STATUS=busy") && 'sent' if $_[0] eq 'status';
    return notify("X_SOCKET_PROXYD_BUSY=$1") && 'sent' if $_[0] =~ /^busy ([01])$/;
    return join ' ', sort keys %ENV if $_[0] eq 'environment';
    return $ENV{NOTIFY_SOCKET} // '' if $_[0] eq 'notify';
    return readlink '/proc/self/fd/0' if $_[0] eq 'stdin';
    return POSIX::sysconf(POSIX::_SC_OPEN_MAX()) if $_[0] eq 'descriptors';
    if ($_[0] eq 'files') {
        opendir my $directory, '/proc/self/fd' or die;
        return join ' ', map { readlink("/proc/self/fd/$_") // '' } readdir $directory;
    }
    return "what?";
}

my $select = IO::Select->new($listener);
until ($end && time_now() >= $end) {
    if (!$is_ready && time_now() >= $ready) {
        $is_ready = 1;
        notify("STATUS=up\nREADY=1\n");
    }
    for my $socket ($select->can_read(0.05)) {
        if ($socket == $listener) {
            my $client = $listener->accept;
            $select->add($client) if $client;
        } elsif (sysread $socket, my $text, 4096) {
            chomp $text;
            syswrite $socket, answer($text) . "\n";
        } else {
            $select->remove($socket);
            close $socket;
        }
    }
}
