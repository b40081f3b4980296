package server

import (
	"sync"

	agentisov1 "github.com/agentiso/agentiso/api/agentiso/v1"
	"github.com/agentiso/agentiso/internal/domain"
)

// relayDepth is how many reports may wait for a slow client before further
// ones are dropped.
const relayDepth = 256

// relay returns a ProgressFunc that never blocks: one goroutine sends what it
// is given, and what comes while too much waits is dropped. stop sends what
// still waits, ends the goroutine and waits for it; it may be called twice,
// and reports after it are ignored.
func relay(send func(*agentisov1.Progress) error) (report domain.ProgressFunc, stop func()) {
	var mu sync.Mutex
	var stopped bool
	queue := make(chan *agentisov1.Progress, relayDepth)
	done := make(chan struct{})
	go func() {
		defer close(done)
		broken := false
		for p := range queue {
			// The call's own context ends the work when its client has gone.
			broken = broken || send(p) != nil
		}
	}()
	report = func(p domain.Progress) {
		mu.Lock()
		defer mu.Unlock()
		if stopped {
			return
		}
		select {
		case queue <- &agentisov1.Progress{Stage: p.Stage, Done: p.Done, Total: p.Total, Unit: p.Unit, Log: p.Log}:
		default:
		}
	}
	stop = func() {
		mu.Lock()
		if !stopped {
			stopped = true
			close(queue)
		}
		mu.Unlock()
		<-done
	}
	return report, stop
}
