package server

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"

	"connectrpc.com/connect"

	agentisov1 "github.com/agentiso/agentiso/api/agentiso/v1"
	"github.com/agentiso/agentiso/internal/fault"
)

// faultOf turns any error of a call into what its user reads. The end of the
// daemon explains every error that it causes.
func (s *Server) faultOf(ctx context.Context, err error) *fault.Error {
	f := fault.As(err)
	if f.Kind == fault.Canceled || f.Kind == fault.Timeout {
		if c := context.Cause(ctx); c != nil && !errors.Is(c, context.Canceled) && !errors.Is(c, context.DeadlineExceeded) {
			return fault.As(c)
		}
	}
	if f.Kind != fault.Internal {
		return f
	}
	if _, isFault := errors.AsType[*fault.Error](err); !isFault {
		if ce, ok := errors.AsType[*connect.Error](err); ok {
			if k := fault.OfCode(ce.Code()); k != fault.Internal {
				return &fault.Error{Kind: k, Msg: err.Error(), Err: err}
			}
		}
	}
	if f.Next == "" {
		c := *f
		c.Next = "The daemon's log has more under request " + callOf(ctx).id + "."
		return &c
	}
	return f
}

// connectError is f as the Connect protocol carries it.
func connectError(f *fault.Error) *connect.Error {
	e := connect.NewError(f.Kind.Codes().Connect, errors.New(f.Msg))
	if d, err := connect.NewErrorDetail(&agentisov1.ErrorInfo{Kind: string(f.Kind), Next: f.Next}); err == nil {
		e.AddDetail(d)
	}
	return e
}

// httpError is a fault on the plain HTTP calls.
type httpError struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
	Kind    string `json:"kind"`
	Next    string `json:"next,omitempty"`
}

// writeError answers r with err in the protocol that r speaks, and leaves err
// to the log.
func (s *Server) writeError(w http.ResponseWriter, r *http.Request, err error) {
	c := callOf(r.Context())
	if c.err == nil {
		c.err = err
	}
	f := s.faultOf(r.Context(), err)
	if ew := connect.NewErrorWriter(); isRPC(r.URL.Path) && ew.IsSupported(r) {
		_ = ew.Write(w, r, connectError(f)) // nobody to tell
		return
	}
	code := f.Kind.Codes().HTTP
	w.Header().Set("Content-Type", "application/json")
	w.Header().Del("Content-Length")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(httpError{Code: code, Message: f.Msg, Kind: string(f.Kind), Next: f.Next})
}

// isRPC reports whether a path is one of a Connect service. The content type
// does not tell: that of any upload could be a unary call's.
func isRPC(path string) bool {
	if strings.HasPrefix(path, "/workspaces/") {
		_, path, _ = strings.Cut(path, "/agent/")
	}
	service, _, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	return strings.Contains(service, ".")
}

func panicked(request string) error {
	return fault.New(fault.Internal, "the daemon met a bug in itself while it answered").
		WithNext("The daemon's log has its trace under request %s: please report it.", request)
}

// refusal is the message of an agent's JSON error, in printable characters.
func refusal(res *http.Response) string {
	var e struct {
		Message string `json:"message"`
	}
	b, _ := io.ReadAll(io.LimitReader(res.Body, maxRefusal))
	if json.Unmarshal(b, &e) != nil || e.Message == "" {
		e.Message = res.Status
	}
	return printable(errors.New(e.Message)).Error()
}
