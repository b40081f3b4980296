package undo

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestUnwindRunsNewestFirstPastErrors(t *testing.T) {
	var s Stack
	var ran []string
	boom := errors.New("boom")
	for _, name := range []string{"record", "disk", "machine"} {
		s.Push(name, func(ctx context.Context) error {
			ran = append(ran, name)
			if err := ctx.Err(); err != nil {
				return err // the caller's end must not reach the cleanup
			}
			if name == "disk" {
				return boom
			}
			return nil
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	first := errors.New("first")
	err := first
	s.Unwind(ctx, time.Minute, &err)
	if diff := cmp.Diff([]string{"machine", "disk", "record"}, ran); diff != "" {
		t.Errorf("order (-want +got):\n%s", diff)
	}
	if !errors.Is(err, first) || !errors.Is(err, boom) || !strings.Contains(err.Error(), "undo disk: boom") {
		t.Errorf("error is %v", err)
	}
	s.Unwind(ctx, time.Minute, &err)
	if len(ran) != 3 {
		t.Errorf("a second Unwind ran something: %v", ran)
	}
}

func TestUnwindHasALimit(t *testing.T) {
	var s Stack
	s.Push("stuck", func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
	var err error
	s.Unwind(t.Context(), time.Millisecond, &err)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error is %v, want the limit's", err)
	}
}

func TestCommitForgets(t *testing.T) {
	var s Stack
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() { s.Push("x", func(context.Context) error { return errors.New("ran") }) })
	}
	wg.Wait()
	s.Commit()
	var err error
	s.Unwind(t.Context(), time.Minute, &err)
	if err != nil {
		t.Errorf("committed steps ran: %v", err)
	}
}
