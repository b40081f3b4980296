package server

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"github.com/agentiso/agentiso/internal/fault"
)

// call is what is kept of one request: for the log line at its end.
type call struct {
	id  string
	op  string // the procedure, or a short name of the path
	ref string // the workspace it names
	err error
}

type callKey struct{}

// callOf returns the call that ctx belongs to; never nil.
func callOf(ctx context.Context) *call {
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		return c
	}
	return &call{}
}

// admit is the outermost handler: it counts the call, gives it an id and a
// context that ends with the server, survives its panic, and logs it once.
func (s *Server) admit(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := &call{id: requestID(r), op: opOf(r.URL.Path)}
		rec := &recorder{ResponseWriter: w}
		rec.Header().Set("X-Request-Id", c.id)
		if !s.begin() {
			s.writeError(rec, r, errClosing())
			return
		}
		defer s.ops.Done()
		ctx, cancel := context.WithCancelCause(context.WithValue(r.Context(), callKey{}, c))
		stop := context.AfterFunc(s.life, func() { cancel(context.Cause(s.life)) })
		defer cancel(nil)
		defer stop()
		r = r.WithContext(ctx)
		began := time.Now()
		// Deferred, so that an aborted answer is logged and counted too.
		defer func() {
			p := recover()
			if p != nil && p != http.ErrAbortHandler { //nolint:errorlint // net/http compares it so
				s.o.Log.Error("panic", "op", c.op, "request", c.id, "err", fmt.Sprint(p), "stack", string(debug.Stack()))
				c.err = fault.New(fault.Internal, "panic: %v", p)
				if !rec.wrote {
					s.writeError(rec, r, panicked(c.id))
					p = nil
				}
			}
			s.finish(c, rec, time.Since(began))
			if p != nil {
				panic(http.ErrAbortHandler)
			}
		}()
		next.ServeHTTP(rec, r)
	})
}

// finish logs and counts one call that has ended.
func (s *Server) finish(c *call, rec *recorder, took time.Duration) {
	s.metrics.observe(c, rec.status(), took)
	level, attrs := slog.LevelDebug, []any{"op", c.op, "request", c.id, "status", rec.status(), "dur", took}
	if c.ref != "" {
		attrs = append(attrs, "workspace", c.ref)
	}
	if c.err != nil {
		f := fault.As(c.err)
		switch f.Kind {
		case fault.Internal:
			level = slog.LevelError
		case fault.Canceled: // the caller knows
		default:
			level = slog.LevelInfo
		}
		attrs = append(attrs, "kind", f.Kind, "err", c.err)
	}
	s.o.Log.Log(context.Background(), level, "call", attrs...)
}

// requestID takes a sane id from the caller, so that its log and ours can be
// laid side by side, or makes one.
func requestID(r *http.Request) string {
	if id := r.Header.Get("X-Request-Id"); id != "" && len(id) <= 64 && strings.IndexFunc(id, notToken) < 0 {
		return id
	}
	b := make([]byte, 8)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

func notToken(r rune) bool {
	return (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && r != '-' && r != '_'
}

// opOf names a path for logs and metrics; what the path means may refine it.
func opOf(path string) string {
	switch {
	case strings.HasPrefix(path, "/agentiso.v1."):
		return strings.TrimPrefix(path, "/agentiso.v1.")
	case strings.HasPrefix(path, "/workspaces/"):
		return "agent"
	}
	return strings.TrimPrefix(path, "/")
}

// recorder remembers how an answer began.
type recorder struct {
	http.ResponseWriter
	code  int
	wrote bool
}

func (w *recorder) WriteHeader(code int) {
	if code >= 200 || code == http.StatusSwitchingProtocols {
		w.code, w.wrote = code, true
	}
	w.ResponseWriter.WriteHeader(code)
}

func (w *recorder) Write(p []byte) (int, error) {
	w.wrote = true
	return w.ResponseWriter.Write(p)
}

// Flush is what package connect asks for before it streams.
func (w *recorder) Flush() {
	w.wrote = true
	_ = http.NewResponseController(w.ResponseWriter).Flush()
}

// Hijack is remembered as the switch of protocols that it serves for.
func (w *recorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err == nil {
		w.code, w.wrote = http.StatusSwitchingProtocols, true
	}
	return conn, rw, err
}

// Unwrap lets http.ResponseController reach the rest.
func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *recorder) status() int {
	if w.code == 0 {
		return http.StatusOK
	}
	return w.code
}

// gone reports whether err only says that nobody listens any more.
func gone(ctx context.Context, err error) bool {
	return errors.Is(err, context.Canceled) && errors.Is(context.Cause(ctx), context.Canceled)
}
