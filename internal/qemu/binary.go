package qemu

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"time"

	"github.com/agentiso/agentiso/internal/cmdrun"
	"github.com/agentiso/agentiso/internal/fault"
)

// The oldest QEMU whose microvm, sandbox and QMP are known to do all that is
// asked of them here: Debian 12's.
const (
	minMajor = 7
	minMinor = 2
)

const defaultBinary = "qemu-system-x86_64"

// Build identifies one QEMU program file.
type Build struct {
	Path         string // absolute, symbolic links resolved
	Version      string // "7.2.22 (Debian 1:7.2+dfsg-7)"
	Major, Minor int
	SizeBytes    int64
	ModTime      time.Time
}

// Key is the same for the same file with the same content, as far as the file
// system tells.
func (b Build) Key() string {
	return fmt.Sprintf("%s %d %d %s", b.Path, b.SizeBytes, b.ModTime.UnixNano(), b.Version)
}

// binary finds QEMU and remembers what it said of its version until the file
// changes.
type binary struct {
	name string // path, or a name to look up in PATH

	mu    sync.Mutex
	known Build
}

// find returns the build, or a fault of kind missing: no such program, a
// program that does not run, or a version that is too old.
func (b *binary) find(ctx context.Context) (Build, error) {
	path, err := exec.LookPath(b.name)
	if err != nil {
		return Build{}, fault.New(fault.Missing, "find QEMU: %w", err).
			WithNext("Install it (Debian, Ubuntu: apt-get install qemu-system-x86), or name the program in vm.qemu_binary.")
	}
	if path, err = filepath.Abs(path); err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return Build{}, fmt.Errorf("find QEMU: %w", err)
	}
	st, err := os.Stat(path)
	if err != nil {
		return Build{}, fmt.Errorf("find QEMU: %w", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if k := b.known; k.Path == path && k.SizeBytes == st.Size() && k.ModTime.Equal(st.ModTime()) {
		return k, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := cmdrun.Host(ctx, path, "--version")
	if err != nil {
		return Build{}, fault.New(fault.Missing, "ask QEMU for its version: %w", err).
			WithNext("Check that %s runs, or name another program in vm.qemu_binary.", path)
	}
	found, err := parseVersion(string(out))
	if err != nil {
		return Build{}, fault.New(fault.Missing, "%s: %w", path, err).
			WithNext("Name a QEMU program in vm.qemu_binary.")
	}
	if found.Major < minMajor || found.Major == minMajor && found.Minor < minMinor {
		return Build{}, fault.New(fault.Missing, "QEMU %s at %s is too old: %d.%d or later is needed", found.Version, path, minMajor, minMinor).
			WithNext("Install a later QEMU, or name one in vm.qemu_binary.")
	}
	found.Path, found.SizeBytes, found.ModTime = path, st.Size(), st.ModTime()
	b.known = found
	return found, nil
}

var versionLine = regexp.MustCompile(`^QEMU emulator version ((\d{1,3})\.(\d{1,3})[^\n]{0,200})`)

// parseVersion reads the first line of `qemu-system-x86_64 --version`.
func parseVersion(out string) (Build, error) {
	m := versionLine.FindStringSubmatch(out)
	if m == nil {
		return Build{}, fmt.Errorf("not QEMU: its version reads %.60q", out)
	}
	major, _ := strconv.Atoi(m[2]) // the pattern admits digits alone
	minor, _ := strconv.Atoi(m[3])
	return Build{Version: m[1], Major: major, Minor: minor}, nil
}

// Find returns the QEMU build that name, a path or a name to look up in PATH
// ("" is qemu-system-x86_64), stands for, or a fault of kind missing.
func Find(ctx context.Context, name string) (Build, error) {
	b := binary{name: name}
	if name == "" {
		b.name = defaultBinary
	}
	return b.find(ctx)
}
