package identity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	defaultFreeze = 10 * time.Second
	maxFreeze     = time.Minute
	// closeThaw bounds what Close waits for a freeze that the kernel is busy
	// with.
	closeThaw = 2 * time.Second
)

// Requests of ioctl_fsfreeze(2).
const (
	fiFreeze = 0xc0045877 // _IOWR('X', 119, int)
	fiThaw   = 0xc0045878 // _IOWR('X', 120, int)
)

// freezer syncs, freezes and thaws one file system. A freeze ends by itself at
// its time limit: a host that dies must not leave a guest that cannot write.
type freezer struct {
	path string
	log  *slog.Logger
	// turn (capacity 1) is held by whoever is in the kernel; its holder may be
	// a goroutine whose caller has given up.
	turn chan struct{}

	mu    sync.Mutex
	held  bool        // frozen by this freezer, and not thawed by it
	timer *time.Timer // thaws; nil when not held
	round uint64      // counts freezes: an old timer must not end a new one
}

func newFreezer(path string, log *slog.Logger) *freezer {
	return &freezer{path: path, log: log, turn: make(chan struct{}, 1)}
}

// frozen reports whether the file system is frozen by this freezer.
func (f *freezer) frozen() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.held
}

// attempt is one call of quiesce. gone, guarded by freezer.mu, says that its
// caller has given up.
type attempt struct {
	freeze bool
	limit  time.Duration
	gone   bool
}

// quiesce syncs and, if freeze is set, freezes for at most limit. When the
// kernel does not get it done within limit or ctx, it is undone as soon as it
// is.
func (f *freezer) quiesce(ctx context.Context, freeze bool, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := f.take(ctx); err != nil {
		return err
	}
	a := &attempt{freeze: freeze, limit: limit}
	done := make(chan error, 1)
	go func() {
		defer f.release()
		done <- f.run(a)
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	select {
	case err := <-done:
		return err
	default:
		a.gone = true
		return fmt.Errorf("quiesce %s: the kernel did not finish: %w", f.path, ctx.Err())
	}
}

// run is quiesce in the kernel, however long it takes.
func (f *freezer) run(a *attempt) error {
	err := f.sync()
	if err == nil && a.freeze {
		f.suspend()
		err = f.freeze()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case !a.freeze:
	case err != nil && f.held:
		f.holdLocked(a.limit) // of the freeze before: it must end all the same
	case err == nil && a.gone:
		_, err = f.thawLocked()
	case err == nil:
		f.holdLocked(a.limit)
	}
	return err
}

// suspend takes the time limit off a freeze that is about to be renewed, which
// the kernel answers at once.
func (f *freezer) suspend() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.round++
	if f.timer != nil {
		f.timer.Stop()
	}
}

// thaw ends a freeze; was tells whether it had held until now.
func (f *freezer) thaw(ctx context.Context) (was bool, err error) {
	if err := f.take(ctx); err != nil {
		return false, err
	}
	defer f.release()
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.held {
		return false, nil
	}
	return f.thawLocked()
}

// close thaws. A freeze that the kernel is still busy with undoes itself only
// if its caller has given up, so close waits for it a little.
func (f *freezer) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeThaw)
	defer cancel()
	_, err := f.thaw(ctx)
	return err
}

func (f *freezer) take(ctx context.Context) error {
	select {
	case f.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("quiesce %s: another call is at it: %w", f.path, ctx.Err())
	}
}

func (f *freezer) release() { <-f.turn }

// holdLocked notes a freeze and sets the time of its end.
func (f *freezer) holdLocked(limit time.Duration) {
	if f.timer != nil {
		f.timer.Stop()
	}
	f.held = true
	f.round++
	round := f.round
	f.timer = time.AfterFunc(limit, func() { f.expire(round) })
}

// expire thaws when the time of a freeze is over.
func (f *freezer) expire(round uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.held || f.round != round {
		return
	}
	_, err := f.thawLocked()
	f.log.Warn("freeze ended by itself", "path", f.path, "err", err)
}

func (f *freezer) thawLocked() (was bool, err error) {
	if f.timer != nil {
		f.timer.Stop()
		f.timer = nil
	}
	f.held = false
	err = f.ioctl(fiThaw)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.EINVAL): // somebody else has thawed it
		return false, nil
	}
	return false, fmt.Errorf("thaw %s: %w", f.path, err)
}

func (f *freezer) sync() error {
	fd, err := f.open()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if f.frozen() {
		return nil // nothing can be dirty, and a sync would wait for the thaw
	}
	if err := unix.Syncfs(fd); err != nil {
		return fmt.Errorf("sync %s: %w", f.path, err)
	}
	return nil
}

func (f *freezer) freeze() error {
	err := f.ioctl(fiFreeze)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EBUSY) && f.frozen():
		return nil
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("freeze %s: %w: it is frozen already, not by the host", f.path, errUnsuitable)
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY):
		return fmt.Errorf("freeze %s: %w: its file system cannot be frozen", f.path, errUnsuitable)
	}
	return fmt.Errorf("freeze %s: %w", f.path, err)
}

func (f *freezer) ioctl(req uint) error {
	fd, err := f.open()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.IoctlSetInt(fd, req, 0)
}

func (f *freezer) open() (int, error) {
	fd, err := unix.Open(f.path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", f.path, err)
	}
	return fd, nil
}
