// Package guest assembles what the agent serves over the link: the process and
// filesystem services with the plain HTTP calls beside them, which existing
// sandbox SDK clients speak, and the Guest service, which is the host's alone.
//
// It decides who may call and as which user; what a call does is the business
// of packages proc, files and identity. It knows no transport: any net.Listener
// whose connections carry HTTP/1.1 or unencrypted HTTP/2 will do.
//
// Who may call:
//
//	/health                        anybody
//	/agentiso.guest.v1.Guest/…     whoever holds the link: the host. It never
//	                               forwards users there, and no user or token
//	                               is asked for
//	/files                         X-Access-Token, or a signature in the query
//	everything else                X-Access-Token
//
// The token is asked for only when the workspace has one. The user of a call is
// the name in "Authorization: Basic" (the password is ignored), for /files also
// the username of the query, else the default user; one that does not exist is
// 401, or unauthenticated in Connect's words.
package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/http"
	"runtime/debug"
	"time"

	"connectrpc.com/connect"

	"github.com/agentiso/agentiso/api/agentiso/guest/v1/guestv1connect"
	"github.com/agentiso/agentiso/api/filesystem/filesystemconnect"
	"github.com/agentiso/agentiso/api/process/processconnect"
	"github.com/agentiso/agentiso/internal/guest/files"
	"github.com/agentiso/agentiso/internal/guest/identity"
	"github.com/agentiso/agentiso/internal/guest/users"
)

// WireVersion is the agent version by which SDK clients decide what they may
// ask for: octet-stream uploads, file metadata, recursive watches, closing of
// standard input. The agent says it in its Server header.
const WireVersion = "0.6.4"

// Limits of the HTTP server.
const (
	headerTimeout  = 10 * time.Second
	idleTimeout    = 2 * time.Minute
	maxHeaderBytes = 64 << 10
	// maxMessage bounds one Connect message, of which standard input sent in
	// one piece is the largest.
	maxMessage = 16 << 20
)

// Identity is who the guest is; *identity.Store is it.
type Identity interface {
	// Current is asked at every call.
	Current() identity.Snapshot
}

// Options are what a [Server] is made of. Process, Guest and Connect may be nil
// in tests: their paths are then not served. They stay the caller's to close.
type Options struct {
	Identity Identity
	// Accounts are the running root's unless set.
	Accounts users.DB
	Process  processconnect.ProcessHandler
	Guest    guestv1connect.GuestHandler
	// Connect serves the TCP connect stream beside the Guest service; the
	// connections that it takes over are its own.
	Connect http.Handler
	Log     *slog.Logger
}

// Server is the agent's HTTP side.
type Server struct {
	opt     Options
	files   *files.Service
	metrics *metrics
	errors  *connect.ErrorWriter
	handler http.Handler
	http    *http.Server
}

// New assembles a server; it starts nothing. Close it all the same.
func New(opt Options) *Server {
	s := &Server{
		opt:     opt,
		metrics: newMetrics("/proc", "/"),
	}
	s.files = files.New(files.Options{
		Lookup:   s.lookup,
		Token:    func() string { return opt.Identity.Current().AccessToken },
		Accounts: opt.Accounts,
		Log:      opt.Log,
	})
	s.handler = s.recovering(s.routes())
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	s.http = &http.Server{
		Handler:           s.handler,
		Protocols:         &protocols,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams:          100,
			MaxReadFrameSize:              256 << 10,
			MaxReceiveBufferPerConnection: 4 << 20,
			MaxReceiveBufferPerStream:     1 << 20,
		},
		ErrorLog: slog.NewLogLogger(opt.Log.Handler(), slog.LevelDebug),
	}
	return s
}

// Handler is everything that the agent serves.
func (s *Server) Handler() http.Handler { return s.handler }

// Serve answers connections from l until l fails or the server is closed,
// which is no error.
func (s *Server) Serve(l net.Listener) error {
	if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve: %w", err)
	}
	return nil
}

// Close ends watches, which would not end by themselves, then waits for the
// calls in progress until ctx is done and cuts what is left.
func (s *Server) Close(ctx context.Context) error {
	ferr := s.files.Close()
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = errors.Join(err, s.http.Close())
	}
	return errors.Join(err, ferr)
}

func (s *Server) routes() http.Handler {
	opts := []connect.HandlerOption{
		connect.WithReadMaxBytes(maxMessage),
		connect.WithRecover(s.recovered),
		// A client's library asks for compression whether or not it pays; the
		// link is faster than gzip, above all under emulation.
		connect.WithCompressMinBytes(math.MaxInt),
	}
	s.errors = connect.NewErrorWriter(opts...)

	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		w.WriteHeader(http.StatusNoContent)
	})
	mux.Handle("GET /metrics", s.token(refusePlain, http.HandlerFunc(s.serveMetrics)))
	mux.Handle("GET /envs", s.token(refusePlain, http.HandlerFunc(s.serveEnvs)))
	// Package files checks the token of /files itself: a signature may stand
	// in for it.
	mux.Handle("/files", s.files)
	mux.Handle("/files/", s.token(refusePlain, s.files))
	mount := func(path string, h http.Handler) {
		mux.Handle(path, s.token(s.refuseConnect, s.user(s.refuseConnect, h)))
	}
	mount(filesystemconnect.NewFilesystemHandler(s.files, opts...))
	if s.opt.Process != nil {
		mount(processconnect.NewProcessHandler(s.opt.Process, opts...))
	}
	if s.opt.Guest != nil {
		mux.Handle(guestv1connect.NewGuestHandler(s.opt.Guest, opts...))
	}
	if s.opt.Connect != nil {
		mux.Handle("GET /"+guestv1connect.GuestName+"/Connect", s.opt.Connect)
	}
	return mux
}

// recovered answers a panic in a Connect handler.
func (s *Server) recovered(_ context.Context, spec connect.Spec, _ http.Header, v any) error {
	s.opt.Log.Error("panic", "op", spec.Procedure, "err", v, "stack", string(debug.Stack()))
	return connect.NewError(connect.CodeInternal, errors.New("internal error of the agent"))
}

// recovering keeps a panic in any other handler from the rest of the agent.
// The connection is cut: what was sent of the answer may look whole.
func (s *Server) recovering(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			switch v := recover(); v {
			case nil:
			case http.ErrAbortHandler:
				panic(v)
			default:
				s.opt.Log.Error("panic", "op", r.URL.Path, "err", v, "stack", string(debug.Stack()))
				panic(http.ErrAbortHandler)
			}
		}()
		w.Header().Set("Server", "agentiso-guest/"+WireVersion)
		h.ServeHTTP(w, r)
	})
}
