package workspace

import (
	"strings"
	"testing"

	"github.com/agentiso/agentiso/internal/fault"
)

type pauses map[string]string

func (p pauses) Paused(id string) string { return p[id] }

// A guest that the host holds says so wherever it is asked for, and its record
// does not keep it.
func TestHeldGuest(t *testing.T) {
	s, _ := newWorld().daemon(t, nil)
	held := pauses{}
	s.o.Pauses = held
	w := mustCreate(t, s, CreateOptions{Name: "a"})
	mustCreate(t, s, CreateOptions{Name: "b"})

	held[w.ID] = "the host's disk is full"
	if got, err := s.Get(t.Context(), "a"); err != nil || got.Reason != held[w.ID] {
		t.Errorf("it is %+v, %v", got, err)
	}
	_, _, err := s.Agent(t.Context(), "a")
	if !fault.Is(err, fault.NoSpace) || !strings.Contains(err.Error(), held[w.ID]) || fault.As(err).Next == "" {
		t.Errorf("its agent: %v", err)
	}
	if _, err := s.Rename(t.Context(), "a", "c"); err != nil {
		t.Fatal(err)
	}
	all, err := s.List(t.Context())
	if err != nil || len(all) != 2 || all[0].Reason == "" || all[1].Reason != "" {
		t.Errorf("list: %+v, %v", all, err)
	}

	delete(held, w.ID)
	if got, err := s.Get(t.Context(), "c"); err != nil || got.Reason != "" {
		t.Errorf("it is %+v, %v", got, err)
	}
	if _, _, err := s.Agent(t.Context(), "c"); err != nil {
		t.Errorf("its agent: %v", err)
	}
}
