package workspace

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"connectrpc.com/connect"

	guestv1 "github.com/agentiso/agentiso/api/agentiso/guest/v1"
	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// Agent returns the way to the agent of a running workspace, with its record.
func (s *Service) Agent(_ context.Context, ref string) (http.RoundTripper, *domain.Workspace, error) {
	e, err := s.resolve(ref)
	if err != nil {
		return nil, nil, err
	}
	w := s.rec(e)
	if w.State != domain.Running {
		return nil, nil, notRunning(w)
	}
	if why := s.paused(w); why != "" {
		return nil, nil, fault.New(fault.NoSpace, "the guest of workspace %s is held: %s", w.Name, why).
			WithNext("Free some space on this host: the guest then goes on by itself.")
	}
	return s.o.Guests.Transport(w.ID), w, nil
}

func notRunning(w *domain.Workspace) error {
	f := fault.New(fault.WrongState, "workspace %s is %s, not running", w.Name, w.State)
	if w.Reason != "" {
		f = fault.New(fault.WrongState, "workspace %s is %s, not running: %s", w.Name, w.State, w.Reason)
	}
	switch w.State {
	case domain.Stopped, domain.Failed:
		f.Next = "Start it with `agentiso start " + w.Name + "`."
	case domain.Creating, domain.Starting:
		f.Next = "It is coming up: try again in a moment."
	}
	return f
}

// Logs calls fn with the console of ref: what is kept, at most tailBytes of it
// (0: all), and with follow what comes until ctx or the console ends. An error
// of fn ends it.
func (s *Service) Logs(ctx context.Context, ref string, follow bool, tailBytes int64, fn func([]byte) error) error {
	e, err := s.resolve(ref)
	if err != nil {
		return err
	}
	id := s.rec(e).ID
	if !follow {
		n := int(tailBytes)
		if n <= 0 {
			n = consoleAll
		}
		if b := s.o.Consoles.Tail(id, n); len(b) > 0 {
			return fn(b)
		}
		return nil
	}
	return s.o.Consoles.Follow(ctx, id, tailBytes, fn)
}

// consoleAll is more than is ever kept of a console.
const consoleAll = 1 << 30

// Stats are what a guest reports of itself and when its machine came up.
type Stats struct {
	Guest *guestv1.StatsResponse
	// Boot is the guest's own time from kernel start to a ready link.
	Boot time.Duration
	// Machine is the process to look at from the host.
	Machine domain.Process
}

// statsLimit bounds asking a guest: one that is busy is told from one that
// hangs by it.
const statsLimit = 5 * time.Second

// Stats asks the guest of ref.
func (s *Service) Stats(ctx context.Context, ref string) (Stats, error) {
	_, w, err := s.Agent(ctx, ref)
	if err != nil {
		return Stats{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, statsLimit)
	defer cancel()
	g := s.guest(w.ID)
	st, err := g.Stats(ctx, connect.NewRequest(&guestv1.StatsRequest{}))
	if err != nil {
		return Stats{}, fmt.Errorf("ask workspace %s for statistics: %w", w.Name, err)
	}
	info, err := g.Info(ctx, connect.NewRequest(&guestv1.InfoRequest{}))
	if err != nil {
		return Stats{}, fmt.Errorf("ask workspace %s who it is: %w", w.Name, err)
	}
	return Stats{Guest: st.Msg, Boot: time.Duration(info.Msg.GetBootNs()), Machine: w.Machine}, nil
}

// DiskUsedBytes is what the workspace's own disk layer holds on the host.
func (s *Service) DiskUsedBytes(ctx context.Context, ref string) (int64, error) {
	e, err := s.resolve(ref)
	if err != nil {
		return 0, err
	}
	return s.o.Disks.UsedBytes(ctx, s.rec(e).ID)
}
