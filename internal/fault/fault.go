// Package fault is the one error that users meet: what failed, why, and what
// to do next, with a kind that every front door maps by the same table.
//
// A fault is made where the cause is understood; layers above wrap it with
// %w and the front door finds it with [As]. What is not a fault is internal:
// it goes to the log, and the user reads that and where.
package fault

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"connectrpc.com/connect"
)

// Kind says what sort of failure it is. It is stable: programs branch on it.
type Kind string

// The kinds. The table below gives each its status codes.
const (
	Internal     Kind = "internal"     // a bug or an unforeseen failure of the host
	Invalid      Kind = "invalid"      // the request is wrong as it stands
	NotFound     Kind = "not_found"    // no such workspace, image, kernel, file
	NameTaken    Kind = "name_taken"   // the name belongs to another
	Ambiguous    Kind = "ambiguous"    // an id prefix that fits several
	WrongState   Kind = "wrong_state"  // not possible in the present state
	InUse        Kind = "in_use"       // something still needs it
	Limit        Kind = "limit"        // over a configured limit
	NoSpace      Kind = "no_space"     // the host's disk is full
	Missing      Kind = "missing"      // the host lacks a program, file or right
	Unavailable  Kind = "unavailable"  // daemon or guest does not answer
	Timeout      Kind = "timeout"      // it took longer than allowed
	Canceled     Kind = "canceled"     // the caller gave up
	BootFailed   Kind = "boot_failed"  // the guest did not come up
	Unsupported  Kind = "unsupported"  // this driver or host cannot do it
	Unauthorized Kind = "unauthorized" // not allowed to
)

// Codes is how each front door says a kind.
type Codes struct {
	HTTP    int
	Connect connect.Code
	Exit    int // of the CLI, where no command's own exit code takes its place
}

var table = map[Kind]Codes{
	Internal:     {http.StatusInternalServerError, connect.CodeInternal, 1},
	Invalid:      {http.StatusBadRequest, connect.CodeInvalidArgument, 2},
	NotFound:     {http.StatusNotFound, connect.CodeNotFound, 3},
	Ambiguous:    {http.StatusBadRequest, connect.CodeInvalidArgument, 3},
	NameTaken:    {http.StatusConflict, connect.CodeAlreadyExists, 4},
	WrongState:   {http.StatusConflict, connect.CodeFailedPrecondition, 4},
	InUse:        {http.StatusConflict, connect.CodeFailedPrecondition, 4},
	Limit:        {http.StatusTooManyRequests, connect.CodeResourceExhausted, 5},
	NoSpace:      {http.StatusInsufficientStorage, connect.CodeResourceExhausted, 5},
	Unavailable:  {http.StatusServiceUnavailable, connect.CodeUnavailable, 6},
	Missing:      {http.StatusPreconditionFailed, connect.CodeFailedPrecondition, 7},
	Unsupported:  {http.StatusNotImplemented, connect.CodeUnimplemented, 7},
	Timeout:      {http.StatusGatewayTimeout, connect.CodeDeadlineExceeded, 8},
	BootFailed:   {http.StatusBadGateway, connect.CodeAborted, 9},
	Unauthorized: {http.StatusUnauthorized, connect.CodeUnauthenticated, 10},
	Canceled:     {499, connect.CodeCanceled, 130},
}

// Codes returns the row of the table for k; an unknown kind is Internal.
func (k Kind) Codes() Codes {
	if c, ok := table[k]; ok {
		return c
	}
	return table[Internal]
}

// Error is a failure a user can read. Msg says what failed and why in lower
// case without a full stop; Next is one sentence that says what to do.
type Error struct {
	Kind Kind
	Msg  string
	Next string
	Err  error // cause for the log; may be nil
}

func (e *Error) Error() string { return e.Msg }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// New makes an error of kind k. A %w in format is kept as the cause.
func New(k Kind, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Kind: k, Msg: err.Error(), Err: errors.Unwrap(err)}
}

// WithNext returns e with the next step set.
func (e *Error) WithNext(format string, args ...any) *Error {
	e.Next = fmt.Sprintf(format, args...)
	return e
}

// As finds the fault in err. A context's end becomes Canceled or Timeout; what
// else is not a fault becomes Internal around err.
func As(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	switch {
	case errors.Is(err, context.Canceled):
		return &Error{Kind: Canceled, Msg: err.Error(), Err: err}
	case errors.Is(err, context.DeadlineExceeded):
		return &Error{Kind: Timeout, Msg: err.Error(), Err: err}
	}
	return &Error{Kind: Internal, Msg: err.Error(), Err: err}
}

// Is reports whether err holds a fault of kind k.
func Is(err error, k Kind) bool {
	return err != nil && As(err).Kind == k
}
