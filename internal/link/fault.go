package link

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/link/wire"
)

const (
	nextLogs    = "See `agentiso logs %s` for the machine's console, then stop and start the workspace."
	nextStart   = "Start the workspace with `agentiso start %s` and try again."
	nextHostile = "Stop and start the workspace; if it happens again, treat what runs in it as hostile and destroy it with `agentiso destroy %s`."
)

func errNotOpen(id string) *fault.Error {
	return fault.New(fault.Unavailable, "workspace %s has no link to a running machine", id).WithNext(nextStart, id)
}

func errClosed(id string) *fault.Error {
	return fault.New(fault.Unavailable, "the link to the agent of workspace %s was closed", id).WithNext(nextStart, id)
}

func errSuspended(id string) *fault.Error {
	return fault.New(fault.Unavailable, "the call to workspace %s was cut off: its machine is being captured", id).
		WithNext("Try again.")
}

func errMeasured(id string) *fault.Error {
	return fault.New(fault.Unavailable, "the call to workspace %s was cut off: its link is being measured", id).
		WithNext("Try again when the benchmark is done.")
}

func errGone(id string, cause error) *fault.Error {
	return fault.New(fault.Unavailable, "the machine of workspace %s is gone: %w", id, cause).WithNext(nextStart, id)
}

func errCut(id string, cause error) *fault.Error {
	return fault.New(fault.Unavailable, "the link to the agent of workspace %s was cut by the machine's side: %w", id, cause).
		WithNext("Look with `agentiso info %s` whether the machine still runs, and try again.", id)
}

func errAnew(id string) *fault.Error {
	return fault.New(fault.Unavailable, "the agent of workspace %s has ended its session or was started again: %w", id, wire.ErrAnew).
		WithNext("Try again; if it happens again, see `agentiso logs %s` for the machine's console.", id)
}

func errViolation(id string, v *wire.ViolationError) *fault.Error {
	return fault.New(fault.Unavailable, "the agent of workspace %s broke the link's protocol: %w", id, v).WithNext(nextHostile, id)
}

func errStalled(id string, limit time.Duration) *fault.Error {
	return fault.New(fault.Unavailable, "the agent of workspace %s has given no sign of life for %v", id, limit).WithNext(nextLogs, id)
}

func errNoAnswer(id string, limit time.Duration, last error) *fault.Error {
	return fault.New(fault.Unavailable, "the agent of workspace %s has not answered within %v: %w", id, limit, last).WithNext(nextLogs, id)
}

func errResponse(id string, cause error) *fault.Error {
	return fault.New(fault.Unavailable, "the agent of workspace %s sent no valid answer: %w", id, cause).WithNext(nextLogs, id)
}

func errReset(id string, cause error) *fault.Error {
	return fault.New(fault.Unavailable, "the agent of workspace %s cut the call off: %w", id, cause).WithNext(nextLogs, id)
}

func errTooManyCalls(id string) *fault.Error {
	return fault.New(fault.Limit, "workspace %s has %d calls in progress, the most there may be", id, wire.MaxStreams).
		WithNext("Wait for some of them to end, or end some.")
}

// waited is the error of a caller whose ctx ended while it waited for the
// agent; last is what stood in the way.
func waited(ctx context.Context, id string, last error) error {
	err := ctx.Err()
	if !errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("wait for the agent of workspace %s: %w", id, err)
	}
	msg := fmt.Sprintf("the agent of workspace %s did not answer in time", id)
	if last != nil {
		msg += ": " + last.Error()
	}
	e := &fault.Error{Kind: fault.Timeout, Msg: msg, Err: err}
	return e.WithNext(nextLogs, id)
}
