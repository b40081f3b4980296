package workspace

import (
	"slices"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// legal is the whole state machine. A move that is not here is a bug or a
// client's error, never a race to be tolerated. A workspace begins in Creating
// and ends when a Destroying record is deleted.
var legal = map[domain.State][]domain.State{
	domain.Creating:   {domain.Running, domain.Destroying},
	domain.Running:    {domain.Stopping, domain.Stopped, domain.Failed, domain.Destroying},
	domain.Stopping:   {domain.Stopped, domain.Destroying},
	domain.Stopped:    {domain.Starting, domain.Destroying},
	domain.Starting:   {domain.Running, domain.Stopped, domain.Destroying},
	domain.Failed:     {domain.Starting, domain.Stopped, domain.Destroying},
	domain.Destroying: {domain.Destroying}, // a destroy that failed is tried again
}

// check returns a wrong_state fault unless w may become next.
func check(w *domain.Workspace, next domain.State) error {
	if slices.Contains(legal[w.State], next) {
		return nil
	}
	f := fault.New(fault.WrongState, "workspace %s is %s and cannot become %s", w.Name, w.State, next)
	switch {
	case w.State == domain.Running && next == domain.Starting:
		f.Next = "It is running already: use it, or stop it first."
	case w.State == domain.Stopped && next == domain.Stopping, w.State == domain.Failed && next == domain.Stopping:
		f.Next = "It has no machine: start it, or destroy it."
	case w.State == domain.Destroying:
		f.Next = "Run `agentiso destroy " + w.Name + "` again to finish taking it down."
	}
	return f
}
