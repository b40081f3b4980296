package workspace

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/agentiso/agentiso/internal/domain"
)

// Recover loads the records, finishes or undoes what a crash cut off, adopts
// the machines that still run, and removes what belongs to no record. Call it
// once, before any other method.
//
// One workspace that cannot be recovered does not keep the others down: it is
// logged, keeps its record, and the next destroy or restart tries again. Only
// records that cannot be read are an error.
func (s *Service) Recover(ctx context.Context) error {
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	records, err := s.o.Records.List(ctx)
	if err != nil {
		return fmt.Errorf("recover: read records: %w", err)
	}
	s.mu.Lock()
	for _, w := range records {
		s.entries[w.ID] = newEntry(w)
	}
	s.mu.Unlock()

	var g errgroup.Group
	g.SetLimit(2 * runtime.NumCPU())
	for _, w := range records {
		e, unlock, err := s.lock(ctx, w.ID)
		if err != nil {
			return fmt.Errorf("recover: %w", err)
		}
		g.Go(func() error {
			defer unlock()
			if err := s.recoverOne(ctx, e, w); err != nil {
				s.o.Log.Error("recover workspace", "workspace", w.ID, "op", "recover", "state", w.State, "err", err)
			}
			return nil
		})
	}
	_ = g.Wait() // always nil: each failure is logged
	if err := s.sweep(ctx); err != nil {
		s.o.Log.Error("sweep what belongs to nobody", "op", "recover", "err", err)
	}
	return nil
}

func (s *Service) recoverOne(ctx context.Context, e *entry, w *domain.Workspace) error {
	c := s.clock("recover", w.ID)
	switch w.State {
	case domain.Creating:
		return s.discard(ctx, e)
	case domain.Destroying:
		return s.finishDestroy(ctx, e, w)
	case domain.Stopping:
		return s.finishStop(ctx, e, w, true)
	case domain.Starting:
		if err := s.takeDown(ctx, c, w); err != nil {
			return err
		}
		_, err := s.move(ctx, e, domain.Stopped, func(r *domain.Workspace) {
			r.Reason, r.Machine = "the daemon ended while it was starting", domain.Process{}
		})
		return err
	case domain.Running:
		if w.Ephemeral { // the client that held it went with the daemon
			return s.discard(ctx, e)
		}
		return s.adopt(ctx, c, e, w)
	}
	return nil
}

// discard destroys a workspace that nobody can want any more.
func (s *Service) discard(ctx context.Context, e *entry) error {
	w, err := s.move(ctx, e, domain.Destroying, nil)
	if err != nil {
		return err
	}
	return s.finishDestroy(ctx, e, w)
}

// adopt takes back the machine of a running workspace, or records its end.
func (s *Service) adopt(ctx context.Context, c *clock, e *entry, w *domain.Workspace) error {
	err := c.step(ctx, "adopt", func(ctx context.Context) error { return s.o.Machines.Adopt(ctx, w.ID, w.Machine) })
	if err == nil {
		if err := s.o.Guests.Open(w.ID, w.Machine.Endpoint); err != nil {
			return fmt.Errorf("open link: %w", err)
		}
		s.watch(e, w.Machine)
		return nil
	}
	if !errors.Is(err, domain.ErrNoMachine) {
		return fmt.Errorf("adopt machine: %w", err)
	}
	if err := s.takeDown(ctx, c, w); err != nil {
		return err
	}
	_, err = s.move(ctx, e, domain.Stopped, func(r *domain.Workspace) {
		r.Reason = "its machine ended while the daemon was down"
		r.Machine, r.StartedAt = domain.Process{}, time.Time{}
	})
	return err
}

// sweep removes machines, disks, network slots and consoles that no record
// names: the leavings of a crash between an effect and its record. What is not
// called as a workspace is was not made here, as where the data directory is
// one with a "disks" of its owner's in it, and stays.
func (s *Service) sweep(ctx context.Context) error {
	known := map[string]bool{}
	for _, w := range s.list() {
		known[w.ID] = true
	}
	var errs []error
	for _, kind := range []struct {
		name   string
		list   func(context.Context) ([]string, error)
		remove func(context.Context, string) error
	}{ // machines first: they hold the others open
		{"machine", s.o.Machines.List, s.o.Machines.Kill},
		{"network slot", s.o.Networks.List, func(ctx context.Context, id string) error {
			return s.o.Networks.Detach(ctx, id, domain.NetworkSlot{})
		}},
		{"disk", s.o.Disks.List, s.o.Disks.Remove},
		{"console", s.o.Consoles.ListConsoles, func(_ context.Context, id string) error { return s.o.Consoles.RemoveConsole(id) }},
	} {
		ids, err := kind.list(ctx)
		if err != nil {
			errs = append(errs, fmt.Errorf("list %ss: %w", kind.name, err))
			continue
		}
		for _, id := range ids {
			if known[id] || !madeID(id) {
				continue
			}
			if s.o.KeepStrays {
				s.o.Log.Warn("found what belongs to nobody, and keep it because the records are new", "op", "recover", "kind", kind.name, "workspace", id)
				continue
			}
			if err := kind.remove(ctx, id); err != nil {
				errs = append(errs, fmt.Errorf("remove %s %s: %w", kind.name, id, err))
				continue
			}
			s.o.Log.Warn("removed what belonged to nobody", "op", "recover", "kind", kind.name, "workspace", id)
		}
	}
	return errors.Join(errs...)
}
