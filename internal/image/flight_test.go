package image

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/agentiso/agentiso/internal/domain"
)

func TestFlightsJoin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f flights
		f.init(2)
		defer f.close()
		goOn := make(chan struct{})
		var runs, reports atomic.Int32
		fn := func(_ context.Context, p domain.ProgressFunc) (*manifest, error) {
			runs.Add(1)
			p.Report(domain.Progress{Stage: "working"})
			<-goOn
			return &manifest{Digest: "d"}, nil
		}
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() {
				m, err := f.do(t.Context(), "key", func(domain.Progress) { reports.Add(1) }, fn)
				if err != nil || m.Digest != "d" {
					t.Errorf("%v %v", m, err)
				}
			})
		}
		synctest.Wait()
		close(goOn)
		wg.Wait()
		if runs.Load() != 1 || reports.Load() != 5 {
			t.Errorf("%d runs, %d reports", runs.Load(), reports.Load())
		}
	})
}

// TestFlightsCancel: a build ends when its last caller has gone, and that
// caller returns after it.
func TestFlightsCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f flights
		f.init(1)
		defer f.close()
		var cleaned atomic.Bool
		fn := func(ctx context.Context, _ domain.ProgressFunc) (*manifest, error) {
			<-ctx.Done()
			cleaned.Store(true)
			return nil, ctx.Err()
		}
		one, cancelOne := context.WithCancel(t.Context())
		two, cancelTwo := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for _, ctx := range []context.Context{one, two} {
			wg.Go(func() {
				if _, err := f.do(ctx, "key", nil, fn); !errors.Is(err, context.Canceled) {
					t.Errorf("error is %v", err)
				}
				if ctx == two && !cleaned.Load() {
					t.Error("the last caller did not wait for the build to clean up")
				}
			})
		}
		synctest.Wait()
		cancelOne()
		synctest.Wait()
		if cleaned.Load() {
			t.Error("cancelled although somebody waits")
		}
		cancelTwo()
		wg.Wait()
	})
}

func TestFlightsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f flights
		f.init(2)
		defer f.close()
		var now, most atomic.Int32
		goOn := make(chan struct{})
		var wg sync.WaitGroup
		for _, key := range []string{"a", "b", "c", "d"} {
			wg.Go(func() {
				f.do(t.Context(), key, nil, func(context.Context, domain.ProgressFunc) (*manifest, error) {
					most.Store(max(most.Load(), now.Add(1)))
					<-goOn
					now.Add(-1)
					return nil, nil
				})
			})
		}
		synctest.Wait()
		close(goOn)
		wg.Wait()
		if most.Load() != 2 {
			t.Errorf("%d at a time", most.Load())
		}
	})
}

func TestFlightsClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var f flights
		f.init(1)
		result := make(chan error, 1)
		go func() {
			_, err := f.do(context.Background(), "key", nil, func(ctx context.Context, _ domain.ProgressFunc) (*manifest, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			})
			result <- err
		}()
		synctest.Wait()
		f.close()
		if err := <-result; !errors.Is(err, context.Canceled) {
			t.Errorf("error is %v", err)
		}
	})
}
