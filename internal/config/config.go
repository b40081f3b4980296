// Package config holds the settings of the daemon and finds them: defaults,
// one TOML file, and the environment.
//
// All keys are in one table (keys.go) with their documentation, type and
// range; loading, `agentiso config print` and docs/config.md all follow it.
// Nothing is guessed: an unknown key, a value of the wrong type or out of
// range, and settings that contradict each other are faults, and all of them
// are reported at once, each with its key's path and the line it stands on.
//
// The file is the first of: the path given (--config), $AGENTISO_CONFIG,
// $XDG_CONFIG_HOME/agentiso/config.toml, /etc/agentiso/config.toml. The first
// two must exist when named. A variable AGENTISO_SECTION_KEY (such as
// AGENTISO_SERVER_DATA_DIR) takes precedence over the file. Daemon and command
// line read the same settings, so that they meet at the same socket.
//
// The package creates nothing but the two directories of [Config.MakeDirs].
package config

import (
	"log/slog"
	"net/netip"
	"time"
)

// Config is every setting. Load has checked it: values are in their ranges and
// agree with one another.
type Config struct {
	Server    Server
	Storage   Storage
	Network   Network
	VM        VM
	Resources Resources
	Images    Images
	Pool      Pool

	// File is the path that was read; "" if there was none.
	File string

	origins map[string]Origin
}

// Server is section [server].
type Server struct {
	Socket        string // at most 107 bytes
	SocketGroup   string
	DataDir       string // absolute
	RunDir        string // absolute
	LogLevel      slog.Level
	LogFormat     string // "text" or "json"
	MetricsListen string // "" or host:port
}

// Storage is section [storage].
type Storage struct {
	Driver string
}

// Network is section [network].
type Network struct {
	Driver       string
	Subnet       netip.Prefix // IPv4, masked
	DNS          []netip.Addr
	AllowPrivate []netip.Prefix // masked
}

// VM is section [vm].
type VM struct {
	Kernel      string
	Initrd      string
	QEMUBinary  string
	Init        string // "fast" or "image"
	Accel       string // "auto", "kvm" or "tcg"
	Link        string // "serial" or "vsock"
	BootTimeout time.Duration
	UIDBase     int // 0: machines run as the daemon's user
	UIDCount    int
}

// Resources is section [resources].
type Resources struct {
	DefaultVCPUs, MaxVCPUs         int
	DefaultMemoryMiB, MaxMemoryMiB int64
	DefaultDiskGiB, MaxDiskGiB     int64
	MaxWorkspaces                  int
}

// Images is section [images].
type Images struct {
	DefaultImage string
}

// Pool is section [pool].
type Pool struct {
	Enabled      bool
	MinSize      int
	MaxSize      int
	TargetFree   int
	MaxMemoryMiB int64
}

// MachineUIDs returns the range of Unix users for machines; a count of 0 means
// that they run as the daemon's own.
func (c *Config) MachineUIDs() (base, count int) {
	if c.VM.UIDBase == 0 {
		return 0, 0
	}
	return c.VM.UIDBase, c.VM.UIDCount
}

// Origin says where a value came from.
type Origin struct {
	// Source is "default", a file's path or an environment variable's name.
	Source string
	Line   int // in the file; 0 otherwise
}

// Origin returns where the value of a key ("vm.accel") came from.
func (c *Config) Origin(path string) Origin {
	if o, ok := c.origins[path]; ok {
		return o
	}
	return Origin{Source: "default"}
}
