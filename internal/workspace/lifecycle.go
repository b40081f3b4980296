package workspace

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"

	guestv1 "github.com/agentiso/agentiso/api/agentiso/guest/v1"
	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/undo"
)

// stopLimit is how long a guest may take to shut down before its machine is
// ended. The agent allows processes 2 s between SIGTERM and SIGKILL, and an
// image's own init 15 s for all of its services (package guest/boot).
const stopLimit = 25 * time.Second

// Start boots a stopped or failed workspace and returns once its guest has
// confirmed its identity. On an error it is stopped again.
func (s *Service) Start(ctx context.Context, ref string) (_ *domain.Workspace, _ Timings, err error) {
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return nil, Timings{}, err
	}
	defer done()
	defer func() { err = cause(ctx, err) }()
	e, unlock, err := s.lock(ctx, ref)
	if err != nil {
		return nil, Timings{}, err
	}
	defer unlock()
	before := s.rec(e)
	if err := check(before, domain.Starting); err != nil {
		return nil, Timings{}, err
	}
	boot, err := s.o.Images.Boot(ctx, before.Kernel)
	if err != nil {
		return nil, Timings{}, err
	}
	w, err := s.move(ctx, e, domain.Starting, nil)
	if err != nil {
		return nil, Timings{}, fmt.Errorf("start workspace %s: %w", before.Name, err)
	}
	c := s.clock("start", w.ID)
	var u undo.Stack
	defer u.Unwind(ctx, undoLimit, &err)
	u.Push("state", func(ctx context.Context) error {
		_, err := s.move(ctx, e, domain.Stopped, func(r *domain.Workspace) {
			r.Reason, r.Machine = "the last start failed", domain.Process{}
		})
		return err
	})
	u.Push("network", func(ctx context.Context) error { return s.o.Networks.Detach(ctx, w.ID, w.Slot) })
	err = c.step(ctx, "network", func(ctx context.Context) (err error) {
		w.Slot, err = s.o.Networks.Attach(ctx, w.ID, w.Policy, w.Slot)
		return err
	})
	if err != nil {
		return nil, Timings{}, fmt.Errorf("start workspace %s: attach network: %w", w.Name, err)
	}
	if err := s.bringUp(ctx, c, &u, w, boot); err != nil {
		return nil, Timings{}, fmt.Errorf("start workspace %s: %w", w.Name, err)
	}
	err = c.step(ctx, "record", func(ctx context.Context) error {
		w.State, w.StartedAt = domain.Running, time.Now()
		return s.save(ctx, e, w)
	})
	if err != nil {
		return nil, Timings{}, fmt.Errorf("start workspace %s: %w", w.Name, err)
	}
	u.Commit()
	s.watch(e, w.Machine)
	return clone(w), c.timings("cold"), nil
}

// Stop shuts the guest down and keeps the disk. With force, or when the guest
// does not end within 25 s, the machine is ended as by pulling the plug. A
// stop goes on to its end even when the caller has gone.
func (s *Service) Stop(ctx context.Context, ref string, force bool) (_ *domain.Workspace, err error) {
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	e, unlock, err := s.lock(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if w := s.rec(e); w.State == domain.Stopped {
		return w, nil
	}
	if w := s.rec(e); w.State == domain.Failed { // no machine: only the word changes
		return s.move(ctx, e, domain.Stopped, nil)
	}
	w, err := s.move(ctx, e, domain.Stopping, nil)
	if err != nil {
		return nil, err
	}
	if err := s.finishStop(ctx, e, w, force); err != nil {
		return nil, fmt.Errorf("stop workspace %s: %w", w.Name, err)
	}
	return s.rec(e), nil
}

// finishStop takes a stopping workspace to stopped. It is not cut short by
// the caller's or the daemon's end: a guest that is killed instead of being
// shut down loses what it had not written.
func (s *Service) finishStop(ctx context.Context, e *entry, w *domain.Workspace, force bool) error {
	ctx = context.WithoutCancel(ctx)
	c := s.clock("stop", w.ID)
	if !force {
		// A guest that does not answer or does not end is ended below.
		_ = c.step(ctx, "shutdown", func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, stopLimit)
			defer cancel()
			if _, err := s.guest(w.ID).Shutdown(ctx, connect.NewRequest(&guestv1.ShutdownRequest{})); err != nil {
				return err
			}
			select {
			case <-s.o.Machines.Done(w.ID):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}
	ctx, cancel := context.WithTimeout(ctx, undoLimit)
	defer cancel()
	if err := s.takeDown(ctx, c, w); err != nil {
		return err
	}
	return c.step(ctx, "record", func(ctx context.Context) error {
		_, err := s.move(ctx, e, domain.Stopped, func(r *domain.Workspace) {
			r.Machine, r.StartedAt = domain.Process{}, time.Time{}
		})
		return err
	})
}

// takeDown ends what a machine needed and leaves disk and record. It goes on
// past errors: what can go, goes.
func (s *Service) takeDown(ctx context.Context, c *clock, w *domain.Workspace) error {
	s.o.Guests.Close(w.ID)
	return errors.Join(
		c.step(ctx, "machine", func(ctx context.Context) error { return s.o.Machines.Kill(ctx, w.ID) }),
		c.step(ctx, "network", func(ctx context.Context) error { return s.o.Networks.Detach(ctx, w.ID, w.Slot) }),
	)
}

// Destroy removes the workspace and everything that it owns. It is legal in
// every state; one that failed halfway is repeated by calling it again. It
// goes on to its end even when the caller has gone.
func (s *Service) Destroy(ctx context.Context, ref string) (id string, err error) {
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return "", err
	}
	defer done()
	e, unlock, err := s.lock(ctx, ref)
	if err != nil {
		return "", err
	}
	defer unlock()
	w, err := s.move(ctx, e, domain.Destroying, nil)
	if fault.Is(err, fault.NoSpace) {
		// Its own disk may be what fills the host, and is going anyway. A crash
		// before the record follows leaves one without a disk, to be destroyed
		// again.
		if err := s.release(ctx, s.rec(e)); err != nil {
			return "", fmt.Errorf("destroy workspace %s: %w", ref, err)
		}
		w, err = s.move(ctx, e, domain.Destroying, nil)
	}
	if err != nil {
		return "", err
	}
	if err := s.finishDestroy(ctx, e, w); err != nil {
		return "", fmt.Errorf("destroy workspace %s: %w", w.Name, err)
	}
	return w.ID, nil
}

// finishDestroy takes a destroying workspace to nothing.
func (s *Service) finishDestroy(ctx context.Context, e *entry, w *domain.Workspace) error {
	if err := s.release(ctx, w); err != nil {
		return err // the record stays, so that a repeat or a restart finishes it
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
	defer cancel()
	return s.clock("destroy", w.ID).step(ctx, "record", func(ctx context.Context) error { return s.forget(ctx, e) })
}

// release ends and removes all that w owns but its record. It may be repeated.
func (s *Service) release(ctx context.Context, w *domain.Workspace) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
	defer cancel()
	c := s.clock("destroy", w.ID)
	return errors.Join(
		s.takeDown(ctx, c, w),
		c.step(ctx, "disk", func(ctx context.Context) error { return s.o.Disks.Remove(ctx, w.ID) }),
		s.o.Consoles.RemoveConsole(w.ID),
	)
}

// Rename gives the workspace another name. The guest's host name, made of the
// id, stays.
func (s *Service) Rename(ctx context.Context, ref, name string) (*domain.Workspace, error) {
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	if err := validName(name); err != nil {
		return nil, err
	}
	e, unlock, err := s.lock(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer unlock()
	w := s.rec(e)
	if w.Name == name {
		return w, nil
	}
	if other, err := s.resolve(name); err == nil && other != e && (s.rec(other).Name == name || s.rec(other).ID == name) {
		return nil, fault.New(fault.NameTaken, "a workspace named %s exists already", name).WithNext("Choose another name.")
	}
	w.Name = name
	if err := s.save(ctx, e, w); err != nil { // the records' unique index decides a race
		return nil, fmt.Errorf("rename workspace %s: %w", ref, err)
	}
	return w, nil
}

// watch waits for the end of e's machine p and records it. It ends with the
// Service, which leaves machines running.
func (s *Service) watch(e *entry, p domain.Process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	id := e.rec.ID
	ended := s.o.Machines.Done(id)
	s.ops.Go(func() {
		select {
		case <-ended:
		case <-s.life.Done():
			return
		}
		select {
		case <-e.op:
		case <-s.life.Done():
			return
		}
		defer func() { e.op <- struct{}{} }()
		s.machineEnded(e, p)
	})
}

// machineEnded records that machine p of e is gone, unless an operation has
// dealt with it.
func (s *Service) machineEnded(e *entry, p domain.Process) {
	w := s.rec(e)
	if !s.present(e) || w.State != domain.Running || w.Machine.PID != p.PID || w.Machine.StartTicks != p.StartTicks {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.life), undoLimit)
	defer cancel()
	exit := s.o.Machines.Exit(w.ID)
	next := domain.Failed
	if exit.Clean {
		next = domain.Stopped
	}
	if err := s.takeDown(ctx, s.clock("ended", w.ID), w); err != nil {
		s.o.Log.Error("clean up after a machine", "workspace", w.ID, "op", "ended", "err", err)
	}
	_, err := s.move(ctx, e, next, func(r *domain.Workspace) {
		r.Reason, r.Machine, r.StartedAt = exit.Reason, domain.Process{}, time.Time{}
	})
	if err != nil {
		s.o.Log.Error("record the end of a machine", "workspace", w.ID, "op", "ended", "err", err)
		return
	}
	s.o.Log.Info("machine ended", "workspace", w.ID, "op", "ended", "state", next, "reason", exit.Reason)
}
