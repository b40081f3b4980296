// Package qemu owns the machines: it starts QEMU processes, finds them again
// after a restart of the daemon, keeps what their consoles print, says how
// they ended, and ends them. It also decides between KVM and emulation.
//
// What runs inside a machine is not its business (that is the link's), nor
// are disks and networks, which it is given ready-made.
//
// # A machine on the host
//
// Each has a run directory <run>/m/<id> of mode 0700 that belongs to the
// daemon: qmp.sock, console.sock, agent.sock, pid and qemu.log. QEMU's user
// has no access to it. The daemon binds the sockets and opens the log, and
// QEMU inherits the descriptors; so a QEMU that its guest has taken over
// cannot put another machine's socket in the place of its own, nor rewrite the
// pid file. It has an empty environment, its own session, /dev/null as
// standard input, QEMU's seccomp sandbox, no core dumps, and, if
// [domain.MachineSpec].UID says so, a user of its own without groups. Such a
// user must be able to reach kernel, initrd, disk and the disk's backing files
// by their paths. Kernel and initrd must not be changed in place while a guest
// boots (QEMU maps them, and dies of SIGBUS when one is cut): replace them by
// rename.
//
// # The console
//
// The daemon is connected to a new machine's console before its guest runs, so
// that not a byte is lost, and keeps a bounded log. While no daemon is
// connected QEMU throws the output away: a guest never waits for one, and the
// log has a gap. A daemon that is connected and does not read (one that was
// sent SIGSTOP) does hold up a guest that prints. What is kept are a hostile
// guest's bytes as they came: who shows them on a terminal must make them
// harmless, or mean it.
//
// # Never lost, never mistaken
//
// The run directory is made before the process and removed after its end, and
// the process carries the directory's path in its command line (-name). So
// whatever a crash of the daemon leaves is found by [Owner.List], also a
// process whose pid was never written down, and no process of another daemon
// is ever taken for ours. A process is only signalled through a pidfd that was
// opened before its identity (boot id, start time, command line) was compared;
// a reused pid fails the comparison.
//
// # The shape of a machine
//
// [Args] gives every machine the same devices in the same order: virtio-serial
// with the agent's port, disk, NIC, and vsock last where it is used. It was
// tried by hand and is kept by TestStateRoundTrip that this shape can be
// captured and restored as the later generations need it (QEMU 7.2, TCG):
// `stop`, `xen-save-devices-state` into a descriptor passed with add-fd
// (/dev/fdset/N, which must be opened write-only) in 1.3 ms, memory read from
// /proc/PID/mem; then the same arguments with a private memory-backend-file
// in the place of mem0, without -kernel, -initrd, -append and -S, with
// `-incoming defer` and migrate-incoming from fd:NAME. The console, the
// agent's port and the sandbox all survive that.
//
// There is no fifth virtio device, and so no virtio-rng, on purpose: microvm
// without ACPI gives its transports the interrupts 12, 11, 10, 9, 8, and 8 is
// the clock's, whose driver then fails in the guest. The guest's random
// generator is ready 0.02 s into the boot from RDRAND, and the agent reseeds
// it from the host in any case.
//
// # Software emulation
//
// Under TCG a machine has one vCPU, whatever was asked for: with two and
// multithreaded TCG one boot in seven crashed in the guest kernel's code
// patching. [EffectiveCPUs] says what a machine gets.
//
// # Locks
//
// Owner.mu, then console.mu. Neither is held across I/O with a QEMU. Every
// goroutine belongs to the Owner; Close waits for them and leaves the machines
// running.
package qemu
