package reap

import (
	"syscall"
)

// Child is one process that a [Reaper] started. It leads a session and a
// process group of its own, both numbered as it is.
type Child struct {
	r    *Reaper
	pid  int
	done chan struct{}

	// Written once, before done is closed.
	status syscall.WaitStatus
	err    error
}

// PID returns the process's number. It may belong to another process once
// Done is closed.
func (c *Child) PID() int { return c.pid }

// Done is closed when the process has been collected.
func (c *Child) Done() <-chan struct{} { return c.done }

// Wait blocks until the process has ended and returns how. The error is
// ErrStopped or ErrLost; the status then says nothing. Any number of callers
// may wait.
func (c *Child) Wait() (syscall.WaitStatus, error) {
	<-c.done
	return c.status, c.err
}

// Signal sends sig to the process, never to another one that has taken its
// number. ErrExited says it has ended.
func (c *Child) Signal(sig syscall.Signal) error {
	return c.WhileHeld(func(pid int) error { return syscall.Kill(pid, sig) })
}

// SignalGroup sends sig to the process group that the process leads. ErrExited
// says the leader has been collected; others of its group may still run.
func (c *Child) SignalGroup(sig syscall.Signal) error {
	return c.WhileHeld(func(pid int) error { return syscall.Kill(-pid, sig) })
}

// WhileHeld runs fn with the certainty that the process is not collected
// meanwhile, so that its number (of process, group and session) is its own.
// fn must be quick: no process is started or collected while it runs. After
// the process has been collected it is not called, and the error is
// ErrExited.
func (c *Child) WhileHeld(fn func(pid int) error) error {
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	select {
	case <-c.done:
		return ErrExited
	default:
		return fn(c.pid)
	}
}

// finish is called once, with the reaper's lock held.
func (c *Child) finish(ws syscall.WaitStatus, err error) {
	c.status, c.err = ws, err
	close(c.done)
}
