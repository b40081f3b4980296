package qemu

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// maxOpenFiles bounds QEMU's descriptors. Under user networking each
	// connection of the guest is one.
	maxOpenFiles = 4096
	// oomScore makes the kernel prefer a machine to the daemon when the host
	// runs out of memory.
	oomScore = "300"
)

// spawn starts argv with files as its descriptors 0, 1, 2, … and returns once
// it has been executed. The child has a session of its own, an empty
// environment, / as its directory and creates files for itself alone. uid 0
// means the daemon's own user; groups are the only supplementary ones.
func spawn(argv []string, files []*os.File, uid int, groups []uint32) (*handle, error) {
	fds := make([]uintptr, len(files))
	for i, f := range files {
		fds[i] = f.Fd()
	}
	pidfd := -1
	sys := &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd}
	if uid != 0 {
		sys.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid), Groups: groups}
	}
	attr := &syscall.ProcAttr{Dir: "/", Env: []string{}, Files: fds, Sys: sys}

	type result struct {
		pid int
		err error
	}
	started := make(chan result, 1)
	go func() {
		// The umask belongs to a thread that has left the others' file
		// system attributes, and the child inherits it. The thread ends with
		// this goroutine, which never unlocks it.
		runtime.LockOSThread()
		if unix.Unshare(unix.CLONE_FS) == nil {
			unix.Umask(0o077)
		}
		pid, err := forkWithoutCore(argv, attr)
		started <- result{pid, err}
	}()
	r := <-started
	runtime.KeepAlive(files)
	if r.err != nil {
		return nil, fmt.Errorf("execute %s: %w", argv[0], r.err)
	}
	if pidfd < 0 { // a kernel before 5.3; the child is ours and cannot be reaped meanwhile
		fd, err := unix.PidfdOpen(r.pid, 0)
		if err != nil {
			_ = syscall.Kill(r.pid, syscall.SIGKILL)
			_, _ = syscall.Wait4(r.pid, nil, 0, nil)
			return nil, fmt.Errorf("open process %d: %w", r.pid, os.NewSyscallError("pidfd_open", err))
		}
		pidfd = fd
	}
	h, err := newHandle(r.pid, pidfd)
	if err != nil {
		_ = syscall.Kill(r.pid, syscall.SIGKILL)
		_, _ = syscall.Wait4(r.pid, nil, 0, nil)
		return nil, err
	}
	return h, nil
}

// coreLimit is held while the process's own limit is lowered. The limit is the
// process's, and so is the lock.
var coreLimit sync.Mutex

// forkWithoutCore starts a child that leaves no core file: a core would hold
// the guest's memory. The limit can only be inherited, because setting another
// user's takes a capability that even root may lack.
func forkWithoutCore(argv []string, attr *syscall.ProcAttr) (int, error) {
	coreLimit.Lock()
	defer coreLimit.Unlock()
	var have unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &have); err != nil {
		return 0, os.NewSyscallError("getrlimit", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: 0, Max: have.Max}); err != nil {
		return 0, os.NewSyscallError("setrlimit", err)
	}
	defer func() { _ = unix.Setrlimit(unix.RLIMIT_CORE, &have) }() // up to the hard limit again: allowed
	return syscall.ForkExec(argv[0], argv, attr)
}

// confine sets what can be set from outside, as far as the daemon may. QEMU has
// not run a guest instruction yet: it is started paused. Where it is not
// allowed, QEMU keeps the soft limit on files that the daemon was started with,
// and the kernel's own choice when memory runs out.
func confine(pid int) {
	var have unix.Rlimit
	if unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &have) == nil {
		to := min(maxOpenFiles, have.Max)
		_ = unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: to, Max: to}, nil)
	}
	_ = os.WriteFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", []byte(oomScore), 0)
}
