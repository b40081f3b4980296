// Package undo collects compensating actions while a multi-step operation is
// in progress, so that a failure halfway leaves nothing behind on the host.
package undo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Stack is a last-in, first-out list of compensating actions. The zero value
// is ready to use. Push may be called by the operation's parallel steps.
type Stack struct {
	mu    sync.Mutex
	steps []step
}

type step struct {
	name string
	fn   func(context.Context) error
}

// Push records fn as the way to undo what the caller is about to do. fn must
// succeed when there is nothing to undo.
func (s *Stack) Push(name string, fn func(context.Context) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps = append(s.steps, step{name, fn})
}

// Commit forgets every recorded action: the operation succeeded.
func (s *Stack) Commit() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps = nil
}

// Unwind runs the recorded actions, newest first, and joins their errors into
// *errp. It runs them even if ctx is done, within limit altogether: cleanup
// must not be skipped because the caller gave up. Defer it right after the
// Stack is declared; after Commit it does nothing.
func (s *Stack) Unwind(ctx context.Context, limit time.Duration, errp *error) {
	s.mu.Lock()
	steps := s.steps
	s.steps = nil
	s.mu.Unlock()
	if len(steps) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	for _, st := range slices.Backward(steps) {
		if err := st.fn(ctx); err != nil {
			*errp = errors.Join(*errp, fmt.Errorf("undo %s: %w", st.name, err))
		}
	}
}
