// Package server offers the daemon on a Unix socket: the Connect services of
// api/agentiso/v1, the upload of images, the metrics, and the way to the
// agents inside running workspaces.
//
// It translates; it decides nothing. What a call means is package workspace's
// and the stores' business, which are reached through the interfaces of
// ports.go; what an error means is in the table of package fault, which is the
// only place that knows status codes.
//
//	/agentiso.v1.{Workspace,Image,Kernel,System}Service/…   Connect
//	/images/import?name=NAME                                POST, a tar stream
//	/workspaces/REF/agent/…                                 the agent's own API, see agent.go
//	/metrics                                                Prometheus
//	/healthz                                                204 while the daemon serves
//
// HTTP/1.1 and HTTP/2 without TLS are both spoken.
//
// Invariants: a call ends at the latest two seconds after [Server.Shutdown]
// began, with an error that says so wherever the protocol can carry one; work
// that has to be finished or undone goes on behind it, and Shutdown waits for
// that as long as its context allows. A caller that goes away ends its call.
// No answer is buffered beyond one frame, so that a slow reader slows its
// writer and nothing grows.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/agentiso/agentiso/api/agentiso/v1/agentisov1connect"
	"github.com/agentiso/agentiso/internal/fault"
)

const (
	// answerWithin and closeWithin bound what a shutdown leaves to calls under
	// way: time to end by themselves, then time to write an error.
	answerWithin = 1 * time.Second
	closeWithin  = 1800 * time.Millisecond

	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute
	// maxMessage bounds one message of the daemon's own services: names,
	// options and an environment of at most 1 MiB.
	maxMessage = 4 << 20
	maxHeader  = 64 << 10
)

// Options are a Server's collaborators; all are required but Metrics and Trace.
type Options struct {
	Workspaces Workspaces
	Images     Images
	Kernels    Kernels
	System     System
	Metrics    http.Handler          // answers GET /metrics
	Registerer prometheus.Registerer // takes the metrics of this package
	// Trace gives every call a span; it must pass the ResponseWriter on as it is.
	Trace func(http.Handler) http.Handler
	Log   *slog.Logger
}

// Server answers calls. Make it with [New].
type Server struct {
	o       Options
	handler http.Handler
	http    *http.Server
	metrics *metrics

	//nolint:containedctx // it is the Server's own life
	life    context.Context // ends, with a fault as its cause, when Shutdown begins
	end     context.CancelCauseFunc
	overdue chan struct{} // closed answerWithin after that
	once    sync.Once

	mu      sync.Mutex // guards stopped, and ops.Add against Shutdown's Wait
	stopped bool
	ops     sync.WaitGroup // calls, and what they left running
}

// New returns a Server that is ready to Serve.
func New(o Options) *Server {
	s := &Server{o: o, metrics: newMetrics(o.Registerer), overdue: make(chan struct{})}
	s.life, s.end = context.WithCancelCause(context.Background())

	mux := http.NewServeMux()
	opts := []connect.HandlerOption{
		connect.WithReadMaxBytes(maxMessage),
		connect.WithCompressMinBytes(math.MaxInt), // a Unix socket is faster than gzip
		connect.WithInterceptors(&bounded{s}),
	}
	mux.Handle(agentisov1connect.NewWorkspaceServiceHandler(&workspaceService{s}, opts...))
	mux.Handle(agentisov1connect.NewImageServiceHandler(&imageService{s}, opts...))
	mux.Handle(agentisov1connect.NewKernelServiceHandler(&kernelService{s}, opts...))
	mux.Handle(agentisov1connect.NewSystemServiceHandler(&systemService{s}, opts...))
	mux.HandleFunc("POST /images/import", s.importImage)
	mux.Handle("/workspaces/{ref}/agent/{path...}", newAgentProxy(s))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	if o.Metrics != nil {
		mux.Handle("GET /metrics", o.Metrics)
	}
	mux.HandleFunc("/", s.unknownPath)
	s.handler = s.admit(mux)
	if o.Trace != nil {
		s.handler = o.Trace(s.handler)
	}

	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	s.http = &http.Server{
		Handler:           s.handler,
		Protocols:         &protocols,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug),
	}
	return s
}

// Handler returns what Serve serves, for tests and further front doors.
func (s *Server) Handler() http.Handler { return s.handler }

// Serve answers calls from l, which it takes over, until Shutdown. It returns
// nil after a Shutdown.
func (s *Server) Serve(l net.Listener) error {
	if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve on %s: %w", l.Addr(), err)
	}
	return nil
}

// Shutdown stops listening, ends the calls under way as the package's comment
// says, and waits for the work that they leave behind until ctx is done.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.stopped = true
	s.mu.Unlock()
	s.end(errClosing())
	var timer *time.Timer
	s.once.Do(func() { timer = time.AfterFunc(answerWithin, func() { close(s.overdue) }) })

	answered, cancel := context.WithTimeout(ctx, closeWithin)
	defer cancel()
	if err := s.http.Shutdown(answered); err != nil {
		_ = s.http.Close() // whoever is still connected reads nothing
	}
	idle := make(chan struct{})
	go func() { s.ops.Wait(); close(idle) }()
	select {
	case <-idle:
		if timer != nil && timer.Stop() {
			close(s.overdue)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("shut down the API: calls are still being undone: %w", context.Cause(ctx))
	}
}

func errClosing() error {
	return fault.New(fault.Unavailable, "the agentiso daemon is shutting down").
		WithNext("Start it again with `agentiso up`, then repeat the command.")
}

// begin counts one piece of work that Shutdown waits for; false after it.
func (s *Server) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return false
	}
	s.ops.Add(1)
	return true
}

func (s *Server) unknownPath(w http.ResponseWriter, r *http.Request) {
	s.writeError(w, r, fault.New(fault.NotFound, "no such path: %s", r.URL.Path).
		WithNext("The services are listed in api/agentiso/v1."))
}
