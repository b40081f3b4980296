package proc

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/guest/reap"
)

// trees makes one cgroup per process tree where the guest has cgroup v2 with
// cgroup.kill (Linux 5.14), so that whoever leaves the session is killed with
// the rest. Without it a tree is the session that its first process leads.
type trees struct {
	dir  string // "" when there are no cgroups
	next atomic.Uint64
	log  *slog.Logger
}

// threadReserve is the part of the machine's threads that processes cannot
// take, as a divisor: a fork bomb must leave the agent enough to fork, to grow
// threads and so to kill it. The Go runtime ends the program when it cannot
// make a thread.
const threadReserve = 8

// newTrees prepares name under the cgroup v2 hierarchy, if there is one.
func newTrees(name string, log *slog.Logger) *trees {
	t := &trees{log: log}
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(root, &st) != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		dir := filepath.Join(root, name)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			log.Info("no cgroup for processes", "err", err)
			return t
		}
		if _, err := os.Stat(filepath.Join(dir, "cgroup.kill")); err != nil {
			log.Info("no cgroup for processes: cgroup.kill is missing", "err", err)
			_ = os.Remove(dir)
			return t
		}
		t.dir = dir
		// With the cpu controller all processes together weigh as much as the
		// agent: a thousand busy ones must not keep it from answering.
		if err := writeFile(filepath.Join(root, "cgroup.subtree_control"), "+cpu"); err != nil {
			log.Info("processes are not weighed against the agent", "err", err)
		}
		t.limitThreads(root)
		return t
	}
	return t
}

// limitThreads keeps threadReserve for the agent, as far as the guest's kernel
// counts processes per cgroup.
func (t *trees) limitThreads(root string) {
	total := intFile("/proc/sys/kernel/threads-max")
	if n := intFile("/proc/sys/kernel/pid_max"); n > 0 && n < total {
		total = n
	}
	if total == 0 {
		return
	}
	limit := total - total/threadReserve
	err := writeFile(filepath.Join(root, "cgroup.subtree_control"), "+pids")
	if err == nil {
		err = writeFile(filepath.Join(t.dir, "pids.max"), strconv.Itoa(limit))
	}
	if err != nil {
		t.log.Info("processes are not limited in number", "err", err)
	}
}

func (t *trees) close() error {
	if t.dir == "" {
		return nil
	}
	if err := removeCgroup(t.dir, cgroupDepth); err != nil {
		return fmt.Errorf("remove cgroup: %w", err)
	}
	return nil
}

// tree is one process and its descendants.
type tree struct {
	mu  sync.Mutex
	dir string // "" without a cgroup
	fd  int    // of dir, for clone; -1 when there is none
}

// open makes a tree. It never fails: without a cgroup of its own it is a
// session.
func (t *trees) open() *tree {
	if t.dir == "" {
		return &tree{fd: -1}
	}
	dir := filepath.Join(t.dir, "p"+strconv.FormatUint(t.next.Add(1), 10))
	err := os.Mkdir(dir, 0o755)
	if err == nil {
		var fd int
		fd, err = unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err == nil {
			return &tree{dir: dir, fd: fd}
		}
		_ = unix.Rmdir(dir)
	}
	t.log.Warn("process has no cgroup", "err", err)
	return &tree{fd: -1}
}

func (tr *tree) path() string {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return tr.dir
}

// place makes attr start the process in the tree.
func (tr *tree) place(attr *syscall.SysProcAttr) {
	if tr.fd >= 0 {
		attr.UseCgroupFD, attr.CgroupFD = true, tr.fd
	}
}

// started releases what only place needs.
func (tr *tree) started() {
	if tr.fd >= 0 {
		_ = unix.Close(tr.fd)
		tr.fd = -1
	}
}

// kill sends SIGKILL to every process of the tree. leader may be nil if it was
// never started. Without a cgroup it reaches the leader's session and group, as
// long as the leader has not been collected.
func (tr *tree) kill(leader *reap.Child) error {
	if dir := tr.path(); dir != "" {
		if err := writeFile(filepath.Join(dir, "cgroup.kill"), "1"); err == nil {
			return nil
		}
	}
	if leader == nil {
		return nil
	}
	err := leader.WhileHeld(killSession)
	if errors.Is(err, reap.ErrExited) {
		return nil
	}
	return err
}

// killSession kills the session and the process group sid. Processes may be
// forking meanwhile: it looks again until there is nobody new.
func killSession(sid int) error {
	const passes = 10
	err := syscall.Kill(-sid, syscall.SIGKILL)
	for range passes {
		found := false
		for _, pid := range allProcesses() {
			s, state := sessionOf(pid)
			if s == sid && state != 'Z' && state != 'X' && syscall.Kill(pid, syscall.SIGKILL) == nil {
				found = true
			}
		}
		if !found {
			break
		}
	}
	if errors.Is(err, syscall.ESRCH) {
		return nil
	}
	return err
}

// processes returns the tree's live processes, as far as a cgroup tells.
func (tr *tree) processes() []int {
	dir := tr.path()
	if dir == "" {
		return nil
	}
	b, err := readLimited(filepath.Join(dir, "cgroup.procs"), 1<<20)
	if err != nil {
		return nil
	}
	var pids []int
	for _, f := range strings.Fields(string(b)) {
		if n, err := strconv.Atoi(f); err == nil && n > 0 {
			pids = append(pids, n)
		}
	}
	return pids
}

// remove gives the tree's cgroup back; false while it has live processes.
func (tr *tree) remove() bool {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if tr.dir == "" {
		return true
	}
	if err := removeCgroup(tr.dir, cgroupDepth); err != nil {
		return false
	}
	tr.dir = ""
	return true
}

// emptyWithin waits until the tree has no live process, at most for limit.
func (tr *tree) emptyWithin(limit time.Duration) bool {
	for end := time.Now().Add(limit); !tr.remove(); {
		if time.Now().After(end) {
			return false
		}
		time.Sleep(2 * time.Millisecond)
	}
	return true
}

// cgroupDepth bounds how deep a guest's own cgroups are followed.
const cgroupDepth = 8

// removeCgroup removes dir with the empty cgroups that a user made below it.
func removeCgroup(dir string, depth int) error {
	err := unix.Rmdir(dir)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if depth == 0 {
		return err
	}
	f, oerr := os.Open(dir)
	if oerr != nil {
		return err
	}
	defer f.Close()
	for {
		list, rerr := f.ReadDir(64)
		for _, e := range list {
			if e.IsDir() {
				_ = removeCgroup(filepath.Join(dir, e.Name()), depth-1)
			}
		}
		if rerr != nil {
			break
		}
	}
	return unix.Rmdir(dir)
}
