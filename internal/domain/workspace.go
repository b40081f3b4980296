// Package domain holds the nouns that the layers of agentiso pass to one
// another: workspace records, machines, disks, network slots, kernels, images.
//
// It decides nothing and does nothing; which moves between states are legal
// is package workspace's business, how a machine is started package qemu's.
// Drivers and the workspace logic both import it, so that neither needs the
// other.
package domain

import (
	"net"
	"net/netip"
	"time"
)

// State is a point in a workspace's life. A crash can be found in any of them.
type State string

// The states.
const (
	Creating   State = "creating"   // being set up; undone if found after a crash
	Running    State = "running"    // the guest has confirmed its identity
	Stopping   State = "stopping"   // shutting down; finished if found after a crash
	Stopped    State = "stopped"    // no process; the disk is kept
	Starting   State = "starting"   // booting again; back to stopped after a crash
	Failed     State = "failed"     // the machine died or cannot be used; Reason says why
	Destroying State = "destroying" // being taken down; finished if found after a crash
)

// Workspace is the record of one workspace: what the user asked for, what it
// was given, and the state that it is meant to be in.
type Workspace struct {
	ID     string // 8 characters of lower-case Crockford base32, never reused while a record exists
	Name   string // RFC 1123 label, unique
	State  State
	Reason string // why it failed or stopped by itself, for people

	CreatedAt time.Time
	StartedAt time.Time // of the present machine; zero without one

	Image       string // as asked for
	ImageDigest string // what Image meant at creation
	Kernel      string // kernel name
	Init        string // "fast" or "image"
	CPUs        int
	MemoryMiB   int64
	DiskBytes   int64 // virtual size
	Env         map[string]string
	User        string // default user; "" is the image's
	Workdir     string // "" is the user's home
	Policy      NetworkPolicy
	// Ephemeral: it lives no longer than the client that holds it, and never
	// past the daemon that made it.
	Ephemeral bool

	Hostname  string
	MachineID string // 32 lower-case hexadecimal digits
	Slot      NetworkSlot
	Disk      Disk
	UID       int     // the machine's Unix user when the daemon is root; 0: the daemon's own
	CID       uint32  // vsock context id, 100 and up; 0 without vsock
	Machine   Process // zero without a machine
}

// NetworkPolicy is what a workspace may reach. The zero value is nothing.
type NetworkPolicy struct {
	AllowInternet bool
}

// NetworkSlot is one machine's place on a network, made before QEMU starts.
type NetworkSlot struct {
	Driver  string // "user" or "bridge"
	MAC     string
	Address netip.Prefix // 10.99.0.5/16
	Gateway netip.Addr
	DNS     []netip.Addr
	TAP     string // bridge driver: the TAP's name
	// Restrict is the user driver's switch: true means that QEMU passes
	// nothing between guest and host or internet.
	Restrict bool
}

// HardwareAddr parses MAC; nil when it is not set.
func (s NetworkSlot) HardwareAddr() net.HardwareAddr {
	m, _ := net.ParseMAC(s.MAC)
	return m
}

// DiskFormat is how QEMU reads a disk.
type DiskFormat string

// The formats.
const (
	Raw   DiskFormat = "raw"
	QCOW2 DiskFormat = "qcow2"
)

// Disk is a block device for a machine.
type Disk struct {
	Path      string
	Format    DiskFormat
	SizeBytes int64 // virtual size
}
