package domain

import "time"

// Kernel is a guest kernel as the kernel store keeps it. It is immutable; a
// new build is a new digest.
type Kernel struct {
	Name    string // "lean" or "debian-6.1.0-56-cloud-amd64"
	Release string // uname -r
	Digest  string // sha256:… of Path's content
	Source  string // package and version it was made from
	Path    string // vmlinux (PVH) or bzImage
	// NeedsACPI: the kernel finds its virtio devices through ACPI tables and
	// not on the command line (Debian's lacks VIRTIO_MMIO_CMDLINE_DEVICES).
	NeedsACPI bool
	// PVH: Path is an ELF with a PVH entry and needs no option ROM.
	PVH       bool
	SizeBytes int64
	CreatedAt time.Time
}

// Image is an immutable root disk with the metadata of its source.
type Image struct {
	Digest     string // sha256:…
	Names      []string
	CreatedAt  time.Time
	SizeBytes  int64 // of the file system
	UsedBytes  int64 // on the host
	Source     string
	User       string
	Workdir    string
	Env        map[string]string
	Entrypoint []string
	Cmd        []string
	Disk       Disk // read only; never write to it
}

// Boot is what a cold boot loads: a kernel and the initrd made for it.
type Boot struct {
	Kernel Kernel
	Initrd string // path; "" when the kernel needs none
	Append string // additions to the kernel command line
}

// LinkKind says which byte channel host and agent use.
type LinkKind string

// The links.
const (
	LinkSerial LinkKind = "serial" // virtio-serial, a Unix socket on the host
	LinkVsock  LinkKind = "vsock"  // needs /dev/vhost-vsock
)

// Endpoint is where the host reaches an agent.
type Endpoint struct {
	Kind   LinkKind
	Socket string // serial: the Unix socket's path
	CID    uint32 // vsock: 100 and up
	// Key is what a vsock connection shows the agent, 16 bytes: any host user
	// can connect to a CID. The agent takes the first key it is shown.
	Key []byte
}

// MachineSpec is everything that package qemu needs to start one machine.
type MachineSpec struct {
	ID         string // the workspace's
	Boot       Boot
	Init       string // "fast" or "image"
	CPUs       int
	MemoryMiB  int64
	Disk       Disk
	Slot       NetworkSlot
	Link       LinkKind
	CID        uint32
	UID        int    // run QEMU as this user and group; 0: as the daemon
	AccelForce string // "kvm", "tcg" or "" for the machine owner's choice
}

// Process identifies one machine's QEMU process beyond its pid, so that a
// reused pid is never mistaken for it.
type Process struct {
	PID        int
	StartTicks uint64 // field 22 of /proc/PID/stat, clock ticks since host boot
	BootID     string // of the host
	RunDir     string // 0700: sockets, pid file, logs
	Accel      string // "kvm" or "tcg"
	Endpoint   Endpoint
}

// Exit says how a machine's process ended.
type Exit struct {
	At     time.Time
	Clean  bool   // the guest or its owner meant it to end
	Reason string // "guest shut down", "killed", QEMU's last words
}
