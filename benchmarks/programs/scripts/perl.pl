# Regular expressions, sorting, processes, files, sockets, threads of data.
use strict; use warnings; use POSIX qw(:sys_wait_h floor); use IO::Socket::INET; use Digest::SHA qw(sha256_hex); use Time::HiRes qw(usleep);
chdir "/out" or die; srand(7);
my %count; $count{$_ % 97}++ for 1 .. 100000; print join(",", map { "$_=$count{$_}" } sort { $a <=> $b } keys %count), "\n";
my $text = join " ", map { sprintf "%x", $_ * 7919 } 1 .. 20000; my @found = $text =~ /\b([a-f]\d+)\b/g; print scalar(@found), " ", sha256_hex($text), "\n";
(my $changed = $text) =~ s/(\d)([a-f])/$2$1/g; print sha256_hex($changed), "\n"; print join(" ", (sort { $b cmp $a } split / /, $text)[0 .. 9]), "\n";
open my $out, ">", "lines" or die; printf $out "%05d\n", $_ * $_ % 99991 for 1 .. 20000; close $out;
open my $in, "<", "lines" or die; my @lines = <$in>; close $in; print scalar(@lines), " ", sha256_hex(join "", sort @lines), "\n"; print -s "lines", "\n";
open my $pipe, "-|", "seq 1 1000 | tac | head -3" or die; print <$pipe>; close $pipe; print "$?\n"; my @pids;
for my $n (1 .. 5) { my $pid = fork; if (!$pid) { usleep(1000 * (6 - $n)); exit $n } push @pids, $pid } print join(",", map { waitpid $_, 0; $? >> 8 } @pids), "\n";
my $server = IO::Socket::INET->new(Listen => 5, LocalAddr => "127.0.0.1", LocalPort => 0) or die; my $port = $server->sockport;
if (!(my $pid = fork)) { my $peer = IO::Socket::INET->new(PeerAddr => "127.0.0.1", PeerPort => $port) or die; print $peer "line $_\n" for 1 .. 500; shutdown $peer, 1; my $sum = 0; $sum += length while <$peer>; exit($sum == 4392 ? 0 : 1) }
my $peer = $server->accept; while (<$peer>) { print $peer scalar reverse $_ } close $peer; wait; print "socket $?\n"; local $SIG{ALRM} = sub { print "alarm\n" }; alarm 1; select undef, undef, undef, 3;
local $SIG{CHLD} = sub { 1 while waitpid(-1, WNOHANG) > 0 }; system "true"; print "$?\n"; eval { die "thrown\n" }; print $@; my @matrix = map { my $r = $_; [map { $r * $_ } 1 .. 50] } 1 .. 50; my $t = 0; $t += $matrix[$_][49 - $_] for 0 .. 49; print "$t\n"; print sprintf("%.10f", atan2(1, 1) * 4), "\n"; exit 5;
