package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/agentiso/agentiso/internal/fault"
)

// Host is what the defaults depend on.
type Host struct {
	UID    int // effective
	Home   string
	Getenv func(string) string
}

// ThisHost describes the running process.
func ThisHost() Host {
	h := Host{UID: os.Geteuid(), Home: os.Getenv("HOME"), Getenv: os.Getenv}
	if h.Home == "" { // a service manager may start us without one
		if u, err := user.LookupId(strconv.Itoa(h.UID)); err == nil {
			h.Home = u.HomeDir
		}
	}
	return h
}

func (h Host) root() bool { return h.UID == 0 }

// xdg returns a base directory of the XDG specification, which says to ignore
// a value that is not absolute; "" if there is none.
func (h Host) xdg(variable, underHome string) string {
	if d := h.Getenv(variable); filepath.IsAbs(d) {
		return filepath.Clean(d)
	}
	if h.Home == "" {
		return ""
	}
	return filepath.Join(h.Home, underHome)
}

func (h Host) dataDir() string {
	if h.root() {
		return "/var/lib/agentiso"
	}
	if d := h.xdg("XDG_DATA_HOME", ".local/share"); d != "" {
		return filepath.Join(d, "agentiso")
	}
	return ""
}

// runDir returns the default directory of sockets. Without a usable
// XDG_RUNTIME_DIR (no login session, or another user's after su) it lies in the
// data directory, which no cleaner of /tmp empties under running machines,
// unless that path is too long for the sockets in it.
func (h Host) runDir(dataDir string) string {
	if h.root() {
		return "/run/agentiso"
	}
	if d := h.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(d) {
		if st, err := os.Stat(d); err == nil && st.IsDir() && owner(st) == h.UID && st.Mode().Perm()&0o077 == 0 {
			return filepath.Join(d, "agentiso")
		}
	}
	if d := filepath.Join(dataDir, "run"); dataDir != "" && len(d) <= maxRunDir {
		return d
	}
	return fmt.Sprintf("/tmp/agentiso-%d", h.UID)
}

// files returns where a configuration file is looked for when none is named.
func (h Host) files() []string {
	var all []string
	if d := h.xdg("XDG_CONFIG_HOME", ".config"); d != "" {
		all = append(all, filepath.Join(d, "agentiso", "config.toml"))
	}
	return append(all, "/etc/agentiso/config.toml")
}

// MakeDirs creates the data and the run directory where they are absent and
// refuses ones that another user could have prepared or can write to. Machines
// that run as users of their own must be able to pass through (0711); what lies
// inside has modes of its own. Otherwise they are closed to others (0700).
func (c *Config) MakeDirs() error {
	mode := fs.FileMode(0o700)
	if c.VM.UIDBase > 0 || c.Server.SocketGroup != "" {
		mode = 0o711
	}
	if err := makeDir(c.Server.DataDir, mode, os.Stat); err != nil {
		return err
	}
	// /tmp is where others can put a symbolic link in the run directory's place.
	return makeDir(c.Server.RunDir, mode, os.Lstat)
}

func makeDir(path string, mode fs.FileMode, stat func(string) (fs.FileInfo, error)) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return dirFault(path, err)
	}
	made := true
	if err := os.Mkdir(path, mode); errors.Is(err, fs.ErrExist) {
		made = false
	} else if err != nil {
		return dirFault(path, err)
	}
	st, err := stat(path)
	if err != nil {
		return dirFault(path, err)
	}
	next := fmt.Sprintf("Remove %s, or configure another directory.", path)
	switch {
	case !st.IsDir():
		return fault.New(fault.Invalid, "%s is not a directory", path).WithNext("%s", next)
	case owner(st) != os.Geteuid():
		return fault.New(fault.Invalid, "%s belongs to user %d and not to the daemon's user %d", path, owner(st), os.Geteuid()).WithNext("%s", next)
	case !made && st.Mode().Perm()&0o022 != 0:
		return fault.New(fault.Invalid, "%s is writable for other users (mode %04o)", path, st.Mode().Perm()).
			WithNext("Run chmod go-w %s after making sure that nothing in it is foreign.", path)
	}
	if want := st.Mode().Perm() | mode; made || want != st.Mode().Perm() {
		if made { // the umask may have taken bits away
			want = mode
		}
		if err := os.Chmod(path, want); err != nil {
			return dirFault(path, err)
		}
	}
	return nil
}

func dirFault(path string, err error) error {
	kind := fault.Missing
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		kind = fault.NoSpace
	}
	return fault.New(kind, "cannot create directory %s: %w", path, err).
		WithNext("Create it for the daemon's user, or configure another one (server.data_dir, server.run_dir).")
}

func owner(st fs.FileInfo) int {
	if s, ok := st.Sys().(*syscall.Stat_t); ok {
		return int(s.Uid)
	}
	return -1
}
