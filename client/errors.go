package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"

	agentisov1 "github.com/agentiso/agentiso/api/agentiso/v1"
	"github.com/agentiso/agentiso/internal/fault"
)

// Kind says what sort of failure an [Error] is.
type Kind string

// The kinds. New ones may come; treat what you do not know as Internal.
const (
	Internal     = Kind(fault.Internal)     // a bug or an unforeseen failure of the host
	Invalid      = Kind(fault.Invalid)      // the request is wrong as it stands
	NotFound     = Kind(fault.NotFound)     // no such workspace, image, kernel, file
	NameTaken    = Kind(fault.NameTaken)    // the name belongs to another
	Ambiguous    = Kind(fault.Ambiguous)    // an id prefix that fits several
	WrongState   = Kind(fault.WrongState)   // not possible in the present state
	InUse        = Kind(fault.InUse)        // something still needs it
	Limit        = Kind(fault.Limit)        // over a configured limit
	NoSpace      = Kind(fault.NoSpace)      // a disk is full
	Missing      = Kind(fault.Missing)      // the host lacks a program, file or right
	Unavailable  = Kind(fault.Unavailable)  // daemon or guest does not answer
	Timeout      = Kind(fault.Timeout)      // it took longer than allowed
	Canceled     = Kind(fault.Canceled)     // the caller gave up
	BootFailed   = Kind(fault.BootFailed)   // the guest did not come up
	Unsupported  = Kind(fault.Unsupported)  // this driver or host cannot do it
	Unauthorized = Kind(fault.Unauthorized) // not allowed to
)

// Error is every error of this package.
type Error struct {
	Kind    Kind
	Message string // what failed and why, in lower case without a full stop
	Next    string // one sentence: what to do; "" when there is nothing to say
	// Guest is true when the agent inside the workspace said so and not the
	// daemon: the file or program meant is one of the guest. Message is then
	// the guest's word: do not print it to a terminal uncleaned.
	Guest bool
	Err   error // cause, may be nil
}

func (e *Error) Error() string { return e.Message }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// ExitCode is what the command line leaves with on this error.
func (e *Error) ExitCode() int { return fault.Kind(e.Kind).Codes().Exit }

// KindOf returns the kind of err; "" when it is no *Error.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return ""
}

func invalid(next, format string, args ...any) *Error {
	return &Error{Kind: Invalid, Message: fmt.Sprintf(format, args...), Next: next}
}

// failed turns the error of a call into an *Error; doing names the call, as in
// "creating a workspace". nil stays nil.
func (c *Client) failed(ctx context.Context, doing string, err error) error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	ce, isConnect := errors.AsType[*connect.Error](err)
	if isConnect && connect.IsWireError(ce) {
		return fromWire(ce)
	}
	// What remains failed on this side of the socket.
	switch {
	case errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil && errors.Is(context.Cause(ctx), context.DeadlineExceeded):
		return &Error{Kind: Timeout, Message: doing + " took longer than allowed", Next: "Allow more time, or look at the daemon's log.", Err: err}
	case ctx.Err() != nil:
		return &Error{Kind: Canceled, Message: doing + " was interrupted", Err: err}
	}
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" {
		return c.noDaemon(err)
	}
	if isConnect && !lostConnection(err) {
		return &Error{Kind: Kind(fault.OfCode(ce.Code())), Message: doing + ": " + ce.Message(), Err: err}
	}
	return c.away(doing, err)
}

// noDaemon explains why nobody could be reached.
func (c *Client) noDaemon(err error) *Error {
	const start = "Start the daemon with `agentiso up`."
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &Error{Kind: Unavailable, Message: "no agentiso daemon is running: there is no socket " + c.socket, Next: start, Err: err}
	case errors.Is(err, syscall.ECONNREFUSED):
		return &Error{Kind: Unavailable, Message: "no agentiso daemon is running: nobody answers on " + c.socket, Next: start, Err: err}
	case errors.Is(err, fs.ErrPermission):
		return &Error{Kind: Unauthorized, Message: "this user may not use the agentiso daemon at " + c.socket,
			Next: "Run the command as the daemon's user, or set server.socket_group in its configuration to a group of yours.", Err: err}
	}
	return &Error{Kind: Unavailable, Message: "connect to the agentiso daemon: " + err.Error(), Next: "See whether it runs with `agentiso doctor`.", Err: err}
}

// probeTimeout bounds asking whether a daemon that cut a connection lives.
const probeTimeout = time.Second

// away explains a connection that broke off in the middle of a call.
func (c *Client) away(doing string, err error) *Error {
	ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
	defer cancel()
	req, rerr := http.NewRequestWithContext(ctx, http.MethodGet, baseURL+"/healthz", nil)
	if rerr == nil {
		if res, derr := c.http.Do(req); derr == nil {
			_ = res.Body.Close()
			return &Error{Kind: Unavailable, Message: "the connection broke while " + doing + ": " + err.Error(),
				Next: "See the workspace's state with `agentiso ls`, and the daemon's log for the reason.", Err: err}
		}
	}
	return &Error{Kind: Unavailable, Message: "the agentiso daemon went away while " + doing,
		Next: "Start it again with `agentiso up`; `agentiso ls` then shows what became of the workspace.", Err: err}
}

func lostConnection(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, net.ErrClosed) ||
		strings.Contains(err.Error(), "EOF") || strings.Contains(err.Error(), "server closed idle connection")
}

// fromWire reads what the daemon or an agent answered.
func fromWire(ce *connect.Error) *Error {
	e := &Error{Kind: Kind(fault.OfCode(ce.Code())), Message: ce.Message(), Guest: true, Err: ce}
	for _, d := range ce.Details() {
		v, err := d.Value()
		if err != nil {
			continue
		}
		if info, ok := v.(*agentisov1.ErrorInfo); ok {
			e.Kind, e.Next, e.Guest = Kind(info.GetKind()), info.GetNext(), false
		}
	}
	return e
}

// maxErrorBody bounds what is read of a failed plain HTTP call.
const maxErrorBody = 64 << 10

// fromHTTP reads the JSON error of a plain HTTP call.
func fromHTTP(doing string, res *http.Response) *Error {
	var body struct {
		Message string `json:"message"`
		Kind    string `json:"kind"`
		Next    string `json:"next"`
	}
	b, _ := io.ReadAll(io.LimitReader(res.Body, maxErrorBody))
	if json.Unmarshal(b, &body) != nil || body.Message == "" {
		body.Message = res.Status
	}
	e := &Error{Kind: Kind(body.Kind), Message: doing + ": " + body.Message, Next: body.Next}
	if e.Kind == "" {
		e.Kind, e.Guest = kindOfStatus(res.StatusCode), true
	}
	return e
}

func kindOfStatus(code int) Kind {
	switch code {
	case http.StatusBadRequest, http.StatusNotAcceptable, http.StatusMethodNotAllowed, http.StatusRequestEntityTooLarge:
		return Invalid
	case http.StatusNotFound:
		return NotFound
	case http.StatusConflict:
		return WrongState
	case http.StatusUnauthorized, http.StatusForbidden:
		return Unauthorized
	case http.StatusInsufficientStorage:
		return NoSpace
	case http.StatusBadGateway, http.StatusServiceUnavailable:
		return Unavailable
	}
	return Internal
}
