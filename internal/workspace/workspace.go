// Package workspace owns the life of a workspace: which states it may be in,
// which moves between them are legal, and in what order disk, network, machine
// and guest are set up and taken down.
//
// It decides; it does not do. Disks, networks, machines and agents are reached
// only through the small interfaces of ports.go. Every decision is written to
// the records before the effect that it allows, so that [Service.Recover] can
// finish or undo whatever a crash cut off: the State of a record is the
// journal.
//
//	found after a crash   done about it
//	creating              undone: nothing of it remains
//	running               its machine is adopted; stopped or failed if it is gone
//	stopping              finished
//	starting              back to stopped
//	destroying            finished
//
// Lock order: an entry's operation lock, then Service.mu. Service.mu is never
// held across a call to another package; the operation lock is, because that
// is what it is for: one operation on a workspace at a time.
package workspace

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// Limits bound what users may ask for. All are inclusive.
type Limits struct {
	MaxWorkspaces    int
	DefaultCPUs      int
	MaxCPUs          int
	DefaultMemoryMiB int64
	MaxMemoryMiB     int64
	DefaultDiskBytes int64
	MaxDiskBytes     int64
}

// Recorder sees every step of every operation: for traces, histograms, and
// tests that crash at each step. Begin is called before a step's effect; end
// after it.
type Recorder interface {
	Begin(ctx context.Context, op, step, workspace string) (stepCtx context.Context, end func(error))
}

// Options are a Service's collaborators and settings; all are required but
// Pauses, Recorder and UIDCount.
type Options struct {
	Disks    Disks
	Networks Networks
	Images   Images
	Machines Machines
	Pauses   Pauses
	Consoles Consoles
	Guests   Guests
	Records  Records
	Recorder Recorder

	Limits Limits
	// DefaultKernel is the kernel of who names none; "" is the kernel store's.
	DefaultKernel string
	DefaultInit   string          // "fast" or "image"
	Link          domain.LinkKind // how machines are linked
	BootTimeout   time.Duration   // of a cold boot, from QEMU's start to the agent's answer
	// UIDBase and UIDCount are the Unix users that machines run as, one each;
	// a count of 0 leaves them the daemon's own.
	UIDBase, UIDCount int
	// KeepStrays keeps Recover from removing what no record names: the records
	// were made just now, and what lies on the host may be all that is left of
	// workspaces whose records were lost.
	KeepStrays bool
	Log        *slog.Logger
}

// Service creates, starts, stops and destroys workspaces. Its methods may be
// called concurrently.
type Service struct {
	o Options

	mu      sync.Mutex
	entries map[string]*entry
	closed  bool

	life context.Context // the Service's own life, not a caller's: it ends when Close begins
	end  context.CancelFunc
	ops  sync.WaitGroup // operations and watchers
}

// entry is one workspace in memory. rec is replaced, never changed; op holds
// one token while nobody operates on it.
type entry struct {
	op  chan struct{}
	rec *domain.Workspace // guarded by Service.mu
}

// New returns a Service without workspaces; call Recover before anything else.
func New(o Options) *Service {
	if o.Recorder == nil {
		o.Recorder = noRecorder{}
	}
	life, end := context.WithCancel(context.Background())
	return &Service{o: o, entries: map[string]*entry{}, life: life, end: end}
}

type noRecorder struct{}

func (noRecorder) Begin(ctx context.Context, _, _, _ string) (context.Context, func(error)) {
	return ctx, func(error) {}
}

// begin admits one operation: its context ends with the caller's or the
// Service's, and Close waits for done.
func (s *Service) begin(ctx context.Context) (opCtx context.Context, done func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, nil, errClosing()
	}
	s.ops.Add(1)
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.life, func() { cancel(errClosing()) })
	return ctx, func() { stop(); cancel(nil); s.ops.Done() }, nil
}

func errClosing() error {
	return fault.New(fault.Unavailable, "the agentiso daemon is shutting down").
		WithNext("Start it again with `agentiso up`, then repeat the command.")
}

// lock waits until nobody operates on e, and holds it until unlock. It fails
// when ctx ends first or when the workspace has gone meanwhile.
func (s *Service) lock(ctx context.Context, ref string) (e *entry, unlock func(), err error) {
	e, err = s.resolve(ref)
	if err != nil {
		return nil, nil, err
	}
	select {
	case <-e.op:
	case <-ctx.Done():
		return nil, nil, fault.New(fault.Timeout, "workspace %s is busy with another operation: %w", s.rec(e).Name, context.Cause(ctx)).
			WithNext("See its state with `agentiso info`, and repeat the command.")
	}
	unlock = func() { e.op <- struct{}{} }
	if !s.present(e) {
		unlock()
		return nil, nil, fault.New(fault.NotFound, "no workspace has the name or id %q", ref).
			WithNext("It was destroyed just now.")
	}
	return e, unlock, nil
}

func newEntry(w *domain.Workspace) *entry {
	e := &entry{op: make(chan struct{}, 1), rec: w}
	e.op <- struct{}{}
	return e
}

// rec returns a copy of e's record.
func (s *Service) rec(e *entry) *domain.Workspace {
	s.mu.Lock()
	defer s.mu.Unlock()
	return clone(e.rec)
}

func (s *Service) present(e *entry) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.entries[e.rec.ID] == e
}

// save makes w the record of e, on disk first.
func (s *Service) save(ctx context.Context, e *entry, w *domain.Workspace) error {
	if err := s.o.Records.Update(ctx, w); err != nil {
		return err
	}
	s.mu.Lock()
	e.rec = clone(w)
	s.mu.Unlock()
	return nil
}

// move checks that e may become next, lets change see the copy, and saves it.
func (s *Service) move(ctx context.Context, e *entry, next domain.State, change func(*domain.Workspace)) (*domain.Workspace, error) {
	w := s.rec(e)
	if err := check(w, next); err != nil {
		return nil, err
	}
	w.State, w.Reason = next, ""
	if change != nil {
		change(w)
	}
	if err := s.save(ctx, e, w); err != nil {
		return nil, err
	}
	return w, nil
}

// Timings tell where the time of a create or a start went.
type Timings struct {
	Start string // "cold"; template and warm come with generations and the pool
	Total time.Duration
	Steps []Step
}

// Step is one part of an operation; parallel steps overlap.
type Step struct {
	Name     string
	Duration time.Duration
}

// clock times the steps of one operation.
type clock struct {
	s     *Service
	op    string
	id    string
	began time.Time

	mu    sync.Mutex
	steps []Step
}

func (s *Service) clock(op, id string) *clock {
	return &clock{s: s, op: op, id: id, began: time.Now()}
}

// step runs one named step under the recorder and keeps its time.
func (c *clock) step(ctx context.Context, name string, fn func(context.Context) error) error {
	ctx, end := c.s.o.Recorder.Begin(ctx, c.op, name, c.id)
	began := time.Now()
	err := fn(ctx)
	took := time.Since(began)
	end(err)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.steps = append(c.steps, Step{name, took})
	return err
}

func (c *clock) timings(start string) Timings {
	c.mu.Lock()
	defer c.mu.Unlock()
	return Timings{Start: start, Total: time.Since(c.began), Steps: c.steps}
}

// Get returns a copy of the record that ref means.
func (s *Service) Get(_ context.Context, ref string) (*domain.Workspace, error) {
	e, err := s.resolve(ref)
	if err != nil {
		return nil, err
	}
	return s.now(s.rec(e)), nil
}

// List returns copies of all records, oldest first.
func (s *Service) List(context.Context) ([]*domain.Workspace, error) {
	all := s.list()
	for _, w := range all {
		s.now(w)
	}
	return all, nil
}

// now adds to a copy of a record what no record keeps: that its guest is held.
func (s *Service) now(w *domain.Workspace) *domain.Workspace {
	if why := s.paused(w); why != "" {
		w.Reason = why
	}
	return w
}

// paused says why the guest of a running workspace is held, "" if it is not.
func (s *Service) paused(w *domain.Workspace) string {
	if s.o.Pauses == nil || w.State != domain.Running {
		return ""
	}
	return s.o.Pauses.Paused(w.ID)
}

// UsersOf names the workspaces whose disks stand on the image digest.
func (s *Service) UsersOf(digest string) []string {
	var names []string
	for _, w := range s.list() {
		if w.ImageDigest == digest {
			names = append(names, w.Name)
		}
	}
	return names
}

// stopAllConcurrency bounds guests shut down side by side by Close.
const stopAllConcurrency = 8

// Close ends every operation under way, waits for their undoing, and leaves
// the machines running unless stopMachines asks for a clean shutdown of each.
func (s *Service) Close(ctx context.Context, stopMachines bool) error {
	var errs []error
	if stopMachines {
		errs = append(errs, s.stopAll(ctx))
	}
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.end()
	idle := make(chan struct{})
	go func() { s.ops.Wait(); close(idle) }()
	select {
	case <-idle:
	case <-ctx.Done():
		errs = append(errs, ctx.Err())
	}
	for _, w := range s.list() {
		s.o.Guests.Close(w.ID)
	}
	return errors.Join(errs...)
}

func (s *Service) stopAll(ctx context.Context) error {
	running := slices.DeleteFunc(s.list(), func(w *domain.Workspace) bool { return w.State != domain.Running })
	var mu sync.Mutex
	var errs []error
	var wg sync.WaitGroup
	slots := make(chan struct{}, stopAllConcurrency)
	for _, w := range running {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if _, err := s.Stop(ctx, w.ID, false); err != nil && !fault.Is(err, fault.NotFound) && !fault.Is(err, fault.WrongState) {
				mu.Lock()
				errs = append(errs, err)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
