// Package reap owns wait(2) for the whole agent: it starts children, hands
// each one's status to whoever started it, and buries the orphans that a PID 1
// inherits.
//
// The difficulty is that an orphan and a child of the agent look the same to
// wait(2). The package therefore first looks at a dead process without
// collecting it (WNOWAIT) and collects it only when it knows whose it is:
//
//   - a known child's status goes to its [Child], always;
//   - an unknown one may be a child whose Start has not returned yet, so it
//     stays a zombie (and its number stays taken) while a Start is under way
//     that began before it was first seen, unless its session shows that it
//     cannot be one: every child leads a session of its own;
//   - what is left is an orphan.
//
// A Start that hangs (its file system does not answer) holds nothing up for
// longer than startGrace: a fork returns to its parent at once when its child
// has died, so an unknown zombie cannot belong to a Start that has been under
// way for that long.
//
// Nothing else in the agent may start processes by os/exec's own Wait while
// orphans are being collected: their status would be taken for an orphan's.
//
// Locks: Reaper.mu alone; nothing blocks while it is held.
package reap

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// startGrace is how old a Start may be and still be given the benefit of
	// the doubt for an unknown zombie.
	startGrace = 10 * time.Second
	// holdTick is how often held zombies are looked at again, beside the end
	// of every Start.
	holdTick = 100 * time.Millisecond
	// batch is how many processes are collected under one hold of the lock, so
	// that a flood of orphans cannot keep Start and Signal out.
	batch = 256
)

// Errors of a [Child] and of Start.
var (
	// ErrStopped says that Run has ended: nobody collects statuses any more.
	ErrStopped = errors.New("reaper has stopped")
	// ErrLost says that the status of a child was collected by somebody else.
	ErrLost = errors.New("exit status was collected elsewhere")
	// ErrExited says that a child has ended and cannot be signalled.
	ErrExited = errors.New("process has ended")
)

// Reaper starts and collects processes. One per agent; use New.
type Reaper struct {
	kick    chan struct{} // capacity 1: something may be collectable
	session int           // the agent's own
	orphans bool          // unknown dead children are ours to collect

	mu       sync.Mutex
	children map[int]*Child
	starting map[*start]struct{}
	held     map[int]uint64 // unknown zombies: the newest start when first seen
	seq      uint64         // of the newest start
	stopped  bool
}

// start is one Start under way.
type start struct {
	seq uint64
	at  time.Time
}

// New returns a Reaper. Orphans are collected if this process is PID 1 or a
// child subreaper at that time (see prctl(2)); otherwise children of this
// process that the Reaper did not start are left alone.
func New() *Reaper {
	// The first look-up makes os try pidfds with a child of its own, whose
	// status must not be taken for an orphan's: have that behind us.
	if p, err := os.FindProcess(os.Getpid()); err == nil {
		_ = p.Release()
	}
	var sub int32
	_ = unix.Prctl(unix.PR_GET_CHILD_SUBREAPER, uintptr(unsafe.Pointer(&sub)), 0, 0, 0)
	session, err := unix.Getsid(0)
	if err != nil {
		session = 0
	}
	return &Reaper{
		kick:     make(chan struct{}, 1),
		session:  session,
		orphans:  os.Getpid() == 1 || sub != 0,
		children: make(map[int]*Child),
		starting: make(map[*start]struct{}),
		held:     make(map[int]uint64),
	}
}

// Start starts cmd as the leader of a new session and watches over it. The
// streams of cmd must be nil or *os.File, and cmd must not carry a context:
// what those need is done in cmd.Wait, which must not be called. Start returns
// when the program has been executed; the errors are those of cmd.Start, and
// ErrStopped.
func (r *Reaper) Start(cmd *exec.Cmd) (*Child, error) {
	if cmd.Cancel != nil {
		return nil, errors.New("start process: command has a context")
	}
	for _, s := range []any{cmd.Stdin, cmd.Stdout, cmd.Stderr} {
		if _, ok := s.(*os.File); s != nil && !ok {
			return nil, fmt.Errorf("start process: stream is a %T, not a file", s)
		}
	}
	attr := syscall.SysProcAttr{}
	if cmd.SysProcAttr != nil {
		attr = *cmd.SysProcAttr
	}
	attr.Setsid, attr.Setpgid = true, false
	cmd.SysProcAttr = &attr

	r.mu.Lock()
	if r.stopped {
		r.mu.Unlock()
		return nil, ErrStopped
	}
	r.seq++
	s := &start{seq: r.seq, at: time.Now()}
	r.starting[s] = struct{}{}
	r.mu.Unlock()

	err := cmd.Start()

	r.mu.Lock()
	defer r.mu.Unlock()
	defer r.wake()
	delete(r.starting, s)
	if err != nil {
		// Package syscall has collected the failed child itself: its number
		// is free, and what is remembered about it is void.
		clear(r.held)
		return nil, err
	}
	c := &Child{r: r, pid: cmd.Process.Pid, done: make(chan struct{})}
	_ = cmd.Process.Release()
	switch gone := !isChild(c.pid); {
	case gone:
		c.finish(0, ErrLost)
	case r.stopped:
		c.finish(0, ErrStopped)
	default:
		delete(r.held, c.pid)
		r.children[c.pid] = c
	}
	return c, nil
}

// Run collects until ctx is done; then every child still alive ends with
// ErrStopped for its waiters (the processes themselves are left alone). It is
// called once.
func (r *Reaper) Run(ctx context.Context) {
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, unix.SIGCHLD)
	defer signal.Stop(sig)
	tick := time.NewTimer(holdTick)
	defer tick.Stop()
	for {
		if r.collect() {
			tick.Reset(holdTick)
		} else {
			tick.Stop()
		}
		select {
		case <-sig:
		case <-r.kick:
		case <-tick.C:
		case <-ctx.Done():
			r.stop()
			return
		}
	}
}

// wake makes Run look.
func (r *Reaper) wake() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

func (r *Reaper) stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopped = true
	for pid, c := range r.children {
		delete(r.children, pid)
		c.finish(0, ErrStopped)
	}
}

// collect collects all that can be; holding says that an unknown zombie was
// left for later.
func (r *Reaper) collect() (holding bool) {
	for {
		more, holding := r.collectSome()
		if !more {
			return holding
		}
	}
}

func (r *Reaper) collectSome() (more, holding bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for range batch {
		pid := zombie(unix.P_ALL, 0)
		if pid == 0 {
			clear(r.held)
			return false, false
		}
		if r.children[pid] == nil {
			if !r.orphans || r.maybeStarting(pid) {
				// It stands in front of the others in the kernel's list: ask
				// for each known child by name.
				for known := range r.children {
					r.bury(known)
				}
				return false, r.orphans
			}
			delete(r.held, pid)
		}
		r.bury(pid)
	}
	return true, false
}

// maybeStarting reports whether pid, a zombie that nobody has claimed, can be
// the child of a Start that has yet to return.
func (r *Reaper) maybeStarting(pid int) bool {
	seen, ok := r.held[pid]
	if !ok {
		seen = r.seq
	}
	candidate := false
	for s := range r.starting {
		if s.seq <= seen && time.Since(s.at) < startGrace {
			candidate = true
			break
		}
	}
	if !candidate {
		return false
	}
	// A child that died before its setsid is still in the agent's session.
	if sid, err := unix.Getsid(pid); err == nil && sid != pid && sid != r.session {
		return false
	}
	r.held[pid] = seen
	return true
}

// bury collects pid if it is dead and tells its Child, if it has one.
func (r *Reaper) bury(pid int) {
	var ws syscall.WaitStatus
	var got int
	var err error
	for {
		got, err = syscall.Wait4(pid, &ws, syscall.WNOHANG, nil)
		if err != syscall.EINTR {
			break
		}
	}
	c := r.children[pid]
	switch {
	case c == nil || err == nil && got == 0:
		return
	case err != nil:
		err = ErrLost
	}
	delete(r.children, pid)
	c.finish(ws, err)
}

// isChild reports whether pid is a child of this process, dead or alive.
func isChild(pid int) bool {
	_, err := waitid(unix.P_PID, pid)
	return err == nil
}

// zombie returns a dead child's number without collecting it; 0 is none.
func zombie(kind, id int) int {
	pid, err := waitid(kind, id)
	if err != nil {
		return 0
	}
	return pid
}

// waitid looks for a dead child. The layout of its answer is that of
// siginfo_t's SIGCHLD member on 64-bit Linux.
func waitid(kind, id int) (int, error) {
	var info struct {
		signo, errno, code, _ int32
		pid                   int32
		_                     [108]byte
	}
	for {
		_, _, e := unix.Syscall6(unix.SYS_WAITID, uintptr(kind), uintptr(id),
			uintptr(unsafe.Pointer(&info)), unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, 0, 0)
		switch e {
		case 0:
			return int(info.pid), nil
		case unix.EINTR:
		default:
			return 0, e
		}
	}
}
