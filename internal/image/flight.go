package image

import (
	"context"
	"sync"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// flights makes one build of several calls for the same thing, and bounds how
// many go on at once. Each build has a goroutine that close waits for.
type flights struct {
	slots chan struct{}
	stop  context.CancelFunc
	base  context.Context // what close cancels

	mu     sync.Mutex
	flying map[string]*flight
	closed bool
	wg     sync.WaitGroup
}

// flight is one build and those who wait for it.
type flight struct {
	cancel  context.CancelFunc
	done    chan struct{}
	m       *manifest // valid once done is closed
	err     error
	waiters map[int]domain.ProgressFunc // guarded by flights.mu
	next    int
	last    domain.Progress
}

func (f *flights) init(slots int) {
	f.slots = make(chan struct{}, slots)
	f.flying = map[string]*flight{}
	f.base, f.stop = context.WithCancel(context.Background())
}

func (f *flights) close() {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.stop()
	f.wg.Wait()
}

var errClosed = fault.New(fault.Unavailable, "the image store is closing").WithNext("Try again when the daemon is up.")

// enter counts one build and returns a context that also ends with close.
func (f *flights) enter(ctx context.Context) (context.Context, context.CancelFunc, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.enterLocked(ctx)
}

func (f *flights) enterLocked(ctx context.Context) (context.Context, context.CancelFunc, error) {
	if f.closed {
		return nil, nil, errClosed
	}
	f.wg.Add(1)
	ctx, cancel := context.WithCancel(ctx)
	unhook := context.AfterFunc(f.base, cancel)
	return ctx, sync.OnceFunc(func() { unhook(); cancel(); f.wg.Done() }), nil
}

// slot waits for its turn.
func (f *flights) slot(ctx context.Context, p domain.ProgressFunc) (release func(), err error) {
	select {
	case f.slots <- struct{}{}:
		return func() { <-f.slots }, nil
	default:
	}
	p.Report(domain.Progress{Stage: "waiting for other images to be made"})
	select {
	case f.slots <- struct{}{}:
		return func() { <-f.slots }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// do runs fn, or joins the run for key that is under way. fn goes on until
// the last of its callers gives up, who then waits for it to clean up.
func (f *flights) do(ctx context.Context, key string, p domain.ProgressFunc, fn func(context.Context, domain.ProgressFunc) (*manifest, error)) (*manifest, error) {
	f.mu.Lock()
	fl, ok := f.flying[key]
	if !ok {
		run, leave, err := f.enterLocked(context.WithoutCancel(ctx))
		if err != nil {
			f.mu.Unlock()
			return nil, err
		}
		fl = &flight{done: make(chan struct{}), waiters: map[int]domain.ProgressFunc{}}
		run, fl.cancel = context.WithCancel(run)
		f.flying[key] = fl
		go f.fly(run, leave, key, fl, fn)
	}
	id := fl.next
	fl.next++
	fl.waiters[id] = p
	if fl.last.Stage != "" {
		p.Report(fl.last)
	}
	f.mu.Unlock()

	select {
	case <-fl.done:
		return fl.m, fl.err
	case <-ctx.Done():
	}
	f.mu.Lock()
	delete(fl.waiters, id)
	last := len(fl.waiters) == 0
	if last {
		f.drop(key, fl) // whoever comes now begins anew
	}
	f.mu.Unlock()
	if last {
		fl.cancel()
		<-fl.done
	}
	return nil, ctx.Err()
}

// fly is the goroutine of one build.
func (f *flights) fly(ctx context.Context, leave func(), key string, fl *flight, fn func(context.Context, domain.ProgressFunc) (*manifest, error)) {
	defer leave()
	defer fl.cancel()
	report := func(p domain.Progress) {
		f.mu.Lock()
		defer f.mu.Unlock()
		fl.last = p
		fl.last.Log = ""
		for _, w := range fl.waiters {
			w.Report(p)
		}
	}
	release, err := f.slot(ctx, report)
	if err == nil {
		fl.m, err = fn(ctx, report)
		release()
	}
	fl.err = err
	f.mu.Lock()
	f.drop(key, fl)
	f.mu.Unlock()
	close(fl.done)
}

func (f *flights) drop(key string, fl *flight) {
	if f.flying[key] == fl {
		delete(f.flying, key)
	}
}
