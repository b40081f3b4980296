package config

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// maxSocketPath is what fits sockaddr_un.sun_path with its final zero byte.
const maxSocketPath = 107

// maxRunDir leaves room for the longest socket below the run directory,
// "/m/" + 8 characters of a workspace's id + "/console.sock".
const maxRunDir = maxSocketPath - len("/m/01234567/console.sock")

// key is one setting: all that is known of it.
type key struct {
	section, name string
	doc           string
	// defaultDoc describes a default that depends on the host.
	defaultDoc string
	field      func(*Config) any // pointer into the configuration
	check      func(v any) error // nil: any value of the type
}

func (k key) path() string { return k.section + "." + k.name }
func (k key) env() string  { return "AGENTISO_" + strings.ToUpper(k.section+"_"+k.name) }

// sections in the order in which they are printed, with what each is about.
var sections = []struct{ name, doc string }{
	{"server", "The daemon itself."},
	{"storage", "Where workspaces keep their disks."},
	{"network", "How machines are connected."},
	{"vm", "How machines are started."},
	{"resources", "What a workspace gets and may ask for."},
	{"images", "Root disks."},
	{"pool", "Warm machines. Checked, but without effect until this build has a pool."},
}

// keys is the table of all settings.
var keys = []key{
	{
		section: "server", name: "socket",
		doc:        "The Unix socket of the API, at most 107 bytes long.",
		defaultDoc: "`agentiso.sock` in `run_dir`",
		field:      func(c *Config) any { return &c.Server.Socket }, check: socketPath,
	},
	{
		section: "server", name: "socket_group",
		doc:   "A group whose members may use the API as well. They can do everything that the daemon can. Empty: only the daemon's user.",
		field: func(c *Config) any { return &c.Server.SocketGroup },
	},
	{
		section: "server", name: "data_dir",
		doc:        "Where images, kernels, disks and records are kept. One daemon to a directory.",
		defaultDoc: "`/var/lib/agentiso` for root, else `$XDG_DATA_HOME/agentiso` (`~/.local/share/agentiso`)",
		field:      func(c *Config) any { return &c.Server.DataDir }, check: absolute,
	},
	{
		section: "server", name: "run_dir",
		doc: fmt.Sprintf("Where machines have their sockets, pid files and logs; at most %d bytes long. Machines outlive the daemon: "+
			"a run directory in $XDG_RUNTIME_DIR outlives the login session only with `loginctl enable-linger`.", maxRunDir),
		defaultDoc: "`/run/agentiso` for root, else `$XDG_RUNTIME_DIR/agentiso`, or `run` in `data_dir` where that variable is unusable, or `/tmp/agentiso-UID` where that is too long",
		field:      func(c *Config) any { return &c.Server.RunDir }, check: runDir,
	},
	{
		section: "server", name: "log_level",
		doc:   "What is logged: debug, info, warn or error.",
		field: func(c *Config) any { return &c.Server.LogLevel },
	},
	{
		section: "server", name: "log_format",
		doc:   "How it is logged: text or json.",
		field: func(c *Config) any { return &c.Server.LogFormat }, check: oneOf("text", "json"),
	},
	{
		section: "server", name: "metrics_listen",
		doc:   "An address such as 127.0.0.1:9464 where Prometheus may read /metrics. Empty: on the API's socket only.",
		field: func(c *Config) any { return &c.Server.MetricsListen }, check: listenAddress,
	},
	{
		section: "storage", name: "driver",
		doc:   "How disks are kept: qcow2 (overlays over the image; any file system).",
		field: func(c *Config) any { return &c.Storage.Driver }, check: oneOf("qcow2"),
	},
	{
		section: "network", name: "driver",
		doc:   "How machines are connected: user (QEMU user networking; needs no rights).",
		field: func(c *Config) any { return &c.Network.Driver }, check: oneOf("user"),
	},
	{
		section: "network", name: "subnet",
		doc:   "The guests' IPv4 network, /8 to /27. With driver user every machine is alone in a copy of it, with the gateway at 2, name service at 3 and the guest at 15.",
		field: func(c *Config) any { return &c.Network.Subnet }, check: guestSubnet,
	},
	{
		section: "network", name: "dns",
		doc:   "Name servers for guests that may reach the internet, at most 8. Empty: the driver's own, which asks the host's.",
		field: func(c *Config) any { return &c.Network.DNS }, check: atMost8,
	},
	{
		section: "network", name: "allow_private",
		doc: "Networks that guests with internet access may reach although they are private: by default such a guest reaches public addresses only, " +
			"not this host, its neighbours or a cloud's metadata service. Enforced where machines run as users of their own (uid_base).",
		field: func(c *Config) any { return &c.Network.AllowPrivate },
	},
	{
		section: "vm", name: "kernel",
		doc:   "The kernel that guests boot: a name of `agentiso kernel ls` or an absolute path. Empty: the default one.",
		field: func(c *Config) any { return &c.VM.Kernel },
	},
	{
		section: "vm", name: "initrd",
		doc:   "A path that overrides the initrd made for the kernel. It must hold this version's agent as /init.",
		field: func(c *Config) any { return &c.VM.Initrd }, check: absoluteOrEmpty,
	},
	{
		section: "vm", name: "qemu_binary",
		doc:   "The QEMU to run: a name to be found in PATH or an absolute path.",
		field: func(c *Config) any { return &c.VM.QEMUBinary }, check: notEmpty,
	},
	{
		section: "vm", name: "init",
		doc:   "What becomes of the guest: fast (the agent stays its init) or image (the image's own init runs, with the agent aside).",
		field: func(c *Config) any { return &c.VM.Init }, check: oneOf("fast", "image"),
	},
	{
		section: "vm", name: "accel",
		doc:   "auto (KVM where a probe has booted a guest under it, emulation otherwise), kvm or tcg.",
		field: func(c *Config) any { return &c.VM.Accel }, check: oneOf("auto", "kvm", "tcg"),
	},
	{
		section: "vm", name: "link",
		doc:   "The channel to the agent: serial (a virtio port) or vsock (needs /dev/vhost-vsock).",
		field: func(c *Config) any { return &c.VM.Link }, check: oneOf("serial", "vsock"),
	},
	{
		section: "vm", name: "boot_timeout",
		doc:   "How long a cold boot may take until the agent answers, 1s to 1h. An image with systemd takes over 30 s under emulation.",
		field: func(c *Config) any { return &c.VM.BootTimeout },
		check: between(time.Second, time.Hour),
	},
	{
		section: "vm", name: "uid_base",
		doc: "The first of the Unix users that machines run as, each machine as one of its own; root only. " +
			"0: machines run as the daemon's user. The default lies above all ranges that Debian, subuid and systemd give out.",
		defaultDoc: "1900000000 for root, else 0",
		field:      func(c *Config) any { return &c.VM.UIDBase }, check: between(0, maxUID),
	},
	{
		section: "vm", name: "uid_count",
		doc:   "How many such users there are; at least max_workspaces.",
		field: func(c *Config) any { return &c.VM.UIDCount }, check: between(1, 1<<20),
	},
	{
		section: "resources", name: "default_vcpus",
		doc:   "Virtual CPUs of a workspace that asks for no number.",
		field: func(c *Config) any { return &c.Resources.DefaultVCPUs }, check: between(1, 255),
	},
	{
		section: "resources", name: "max_vcpus",
		doc:   "Most virtual CPUs of one workspace.",
		field: func(c *Config) any { return &c.Resources.MaxVCPUs }, check: between(1, 255),
	},
	{
		section: "resources", name: "default_memory_mb",
		doc:   "Memory in MiB of a workspace that asks for none.",
		field: func(c *Config) any { return &c.Resources.DefaultMemoryMiB }, check: between[int64](128, 4<<20),
	},
	{
		section: "resources", name: "max_memory_mb",
		doc:   "Most memory in MiB of one workspace.",
		field: func(c *Config) any { return &c.Resources.MaxMemoryMiB }, check: between[int64](128, 4<<20),
	},
	{
		section: "resources", name: "default_disk_gb",
		doc:   "Disk in GiB of a workspace that asks for none; an image that is larger wins.",
		field: func(c *Config) any { return &c.Resources.DefaultDiskGiB }, check: between[int64](1, 1<<14),
	},
	{
		section: "resources", name: "max_disk_gb",
		doc:   "Largest disk in GiB of one workspace.",
		field: func(c *Config) any { return &c.Resources.MaxDiskGiB }, check: between[int64](1, 1<<14),
	},
	{
		section: "resources", name: "max_workspaces",
		doc:   "Most workspaces that may exist, running or not.",
		field: func(c *Config) any { return &c.Resources.MaxWorkspaces }, check: between(1, 10_000),
	},
	{
		section: "images", name: "default_image",
		doc:   "The image of a workspace that names none.",
		field: func(c *Config) any { return &c.Images.DefaultImage }, check: notEmpty,
	},
	{
		section: "pool", name: "enabled",
		doc:   "Keep machines booted ahead of demand.",
		field: func(c *Config) any { return &c.Pool.Enabled },
	},
	{
		section: "pool", name: "min_size",
		doc:   "Fewest machines that the pool keeps; at most max_size.",
		field: func(c *Config) any { return &c.Pool.MinSize }, check: between(0, 1000),
	},
	{
		section: "pool", name: "max_size",
		doc:   "Most machines that the pool keeps.",
		field: func(c *Config) any { return &c.Pool.MaxSize }, check: between(0, 1000),
	},
	{
		section: "pool", name: "target_free",
		doc:   "How many unclaimed machines the pool aims at; at most max_size.",
		field: func(c *Config) any { return &c.Pool.TargetFree }, check: between(0, 1000),
	},
	{
		section: "pool", name: "max_memory_mb",
		doc:   "Most memory in MiB of all unclaimed machines together.",
		field: func(c *Config) any { return &c.Pool.MaxMemoryMiB }, check: between[int64](0, 16<<20),
	},
}

// maxUID leaves out the two highest numbers, which mean "nobody" and "no change".
const maxUID = 1<<32 - 3

// defaults returns the settings of a host without a file; the paths below
// run_dir and data_dir are filled in by derive.
func defaults(h Host) *Config {
	c := &Config{
		Server:  Server{LogLevel: slog.LevelInfo, LogFormat: "text", DataDir: h.dataDir()},
		Storage: Storage{Driver: "qcow2"},
		Network: Network{Driver: "user", Subnet: netip.MustParsePrefix("10.0.2.0/24")},
		VM: VM{
			QEMUBinary: "qemu-system-x86_64", Init: "fast", Accel: "auto", Link: "serial",
			BootTimeout: 90 * time.Second, UIDCount: 1 << 16,
		},
		Resources: Resources{
			DefaultVCPUs: 1, MaxVCPUs: 8, DefaultMemoryMiB: 512, MaxMemoryMiB: 8192,
			DefaultDiskGiB: 10, MaxDiskGiB: 100, MaxWorkspaces: 100,
		},
		Images:  Images{DefaultImage: "dev"},
		Pool:    Pool{MinSize: 2, MaxSize: 10, TargetFree: 3, MaxMemoryMiB: 8192},
		origins: map[string]Origin{},
	}
	if h.root() {
		// systemd.io/UIDS-GIDS: containers end at 1879048191; useradd and
		// subuid stay below 600100000 (login.defs).
		c.VM.UIDBase = 1_900_000_000
	}
	return c
}

// agree checks what no key can say alone.
func (c *Config) agree(h Host, bad func(path, format string, args ...any)) {
	atMost := func(low string, a int64, high string, b int64) {
		if a > b {
			bad(low, "%d is more than %s = %d", a, high, b)
		}
	}
	r, p := c.Resources, c.Pool
	atMost("resources.default_vcpus", int64(r.DefaultVCPUs), "resources.max_vcpus", int64(r.MaxVCPUs))
	atMost("resources.default_memory_mb", r.DefaultMemoryMiB, "resources.max_memory_mb", r.MaxMemoryMiB)
	atMost("resources.default_disk_gb", r.DefaultDiskGiB, "resources.max_disk_gb", r.MaxDiskGiB)
	atMost("pool.min_size", int64(p.MinSize), "pool.max_size", int64(p.MaxSize))
	atMost("pool.target_free", int64(p.TargetFree), "pool.max_size", int64(p.MaxSize))
	if c.VM.UIDBase > 0 {
		if !h.root() {
			bad("vm.uid_base", "only root can run machines as other users, and this is user %d; use 0", h.UID)
		}
		if c.VM.UIDBase > maxUID-c.VM.UIDCount {
			bad("vm.uid_base", "%d users from %d on do not fit below %d", c.VM.UIDCount, c.VM.UIDBase, maxUID)
		}
		if c.VM.UIDBase < 1000 {
			bad("vm.uid_base", "%d is among the system's own users; use a range above 1000 that nobody else uses", c.VM.UIDBase)
		}
		if c.VM.UIDCount < r.MaxWorkspaces {
			bad("vm.uid_count", "%d is less than resources.max_workspaces = %d", c.VM.UIDCount, r.MaxWorkspaces)
		}
	}
}

func oneOf(allowed ...string) func(any) error {
	return func(v any) error {
		if s := v.(string); !slices.Contains(allowed, s) {
			return fmt.Errorf("%q is not one of %s", s, strings.Join(allowed, ", "))
		}
		return nil
	}
}

func between[T int | int64 | time.Duration](low, high T) func(any) error {
	return func(v any) error {
		if n := v.(T); n < low || n > high {
			return fmt.Errorf("%v is outside %v to %v", n, low, high)
		}
		return nil
	}
}

func notEmpty(v any) error {
	if v.(string) == "" {
		return fmt.Errorf("must not be empty")
	}
	return nil
}

func absolute(v any) error {
	s := v.(string)
	if !filepath.IsAbs(s) {
		return fmt.Errorf("%q is not an absolute path", s)
	}
	if filepath.Clean(s) == "/" {
		return fmt.Errorf("%q is the root directory", s)
	}
	return nil
}

func absoluteOrEmpty(v any) error {
	if v.(string) == "" {
		return nil
	}
	return absolute(v)
}

func socketPath(v any) error {
	if n := len(v.(string)); n > maxSocketPath {
		return fmt.Errorf("the path has %d bytes, and a Unix socket's can have %d", n, maxSocketPath)
	}
	return absolute(v)
}

func runDir(v any) error {
	if n := len(v.(string)); n > maxRunDir {
		return fmt.Errorf("the path has %d bytes, and the sockets below it leave room for %d", n, maxRunDir)
	}
	return absolute(v)
}

func listenAddress(v any) error {
	s := v.(string)
	if s == "" {
		return nil
	}
	if _, port, err := net.SplitHostPort(s); err != nil || port == "" {
		return fmt.Errorf("%q is not an address of the form host:port", s)
	}
	return nil
}

func guestSubnet(v any) error {
	p := v.(netip.Prefix)
	if !p.Addr().Is4() || p.Bits() < 8 || p.Bits() > 27 {
		return fmt.Errorf("%s is not an IPv4 network of /8 to /27", p)
	}
	if p != p.Masked() {
		return fmt.Errorf("%s has host bits set; did you mean %s?", p, p.Masked())
	}
	return nil
}

func atMost8(v any) error {
	if n := len(v.([]netip.Addr)); n > 8 {
		return fmt.Errorf("%d servers are more than 8", n)
	}
	return nil
}
