package server

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"regexp"
	"strings"

	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/agentiso/agentiso/api/filesystem"
	"github.com/agentiso/agentiso/api/process"
	"github.com/agentiso/agentiso/internal/fault"
)

// offered are the paths below /workspaces/REF/agent/ that users may call:
//
//	process.Process/METHOD, filesystem.Filesystem/METHOD   Connect
//	files, files/compose, files/archive, metrics, health, envs
//	tcp?port=N[&host=H]                                    an upgrade, see tunnel.go
//
// The Guest service, by which the daemon rules the guest, is not among them.
func offered() map[string]bool {
	m := map[string]bool{
		"files": true, "files/compose": true, "files/archive": true,
		"metrics": true, "health": true, "envs": true,
	}
	for _, f := range []protoreflect.FileDescriptor{process.File_process_process_proto, filesystem.File_filesystem_filesystem_proto} {
		for i := range f.Services().Len() {
			svc := f.Services().Get(i)
			for j := range svc.Methods().Len() {
				m[string(svc.FullName())+"/"+string(svc.Methods().Get(j).Name())] = true
			}
		}
	}
	return m
}

// agentProxy passes calls on to the agents of running workspaces. What comes
// back is a guest's word: it is passed on within the limits of the link's
// transport and never interpreted, but for the framing of streams (cut.go).
type agentProxy struct {
	s       *Server
	offered map[string]bool
	proxy   *httputil.ReverseProxy
}

// target is where one call goes; it travels in the request's context.
type target struct {
	transport http.RoundTripper
	id        string
	workspace string // its name, for errors
	path      string
}

type targetKey struct{}

func newAgentProxy(s *Server) *agentProxy {
	p := &agentProxy{s: s, offered: offered()}
	p.proxy = &httputil.ReverseProxy{
		FlushInterval:  -1, // events are small, rare and waited for
		Rewrite:        rewrite,
		Transport:      byTarget{},
		ModifyResponse: p.guardStream,
		ErrorHandler:   p.fail,
		ErrorLog:       slog.NewLogLogger(s.o.Log.Handler(), slog.LevelDebug),
	}
	return p
}

func (p *agentProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := callOf(r.Context())
	c.ref = r.PathValue("ref")
	path := r.PathValue("path")
	if path != "tcp" && !p.offered[path] {
		c.op = "agent"
		p.s.writeError(w, r, fault.New(fault.NotFound, "an agent offers no path /%s", path).
			WithNext("Paths: process.Process/…, filesystem.Filesystem/…, files, files/compose, files/archive, tcp, metrics, health, envs."))
		return
	}
	c.op = "agent/" + path
	transport, ws, err := p.s.o.Workspaces.Agent(r.Context(), c.ref)
	if err != nil {
		p.s.writeError(w, r, err)
		return
	}
	c.ref = ws.ID
	t := target{transport: transport, id: ws.ID, workspace: ws.Name, path: path}
	if path == "tcp" {
		p.tunnel(w, r, t)
		return
	}
	// A guest may answer before it has read the body, as a command that ended
	// does to its standard input; without full duplex HTTP/1.1 would first
	// wait for the rest of it.
	_ = http.NewResponseController(w).EnableFullDuplex()
	p.proxy.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), targetKey{}, t)))
}

func rewrite(r *httputil.ProxyRequest) {
	t, _ := r.In.Context().Value(targetKey{}).(target)
	r.Out.URL.Scheme, r.Out.URL.Host, r.Out.Host = "http", "agent", "agent"
	r.Out.URL.Path, r.Out.URL.RawPath = "/"+t.path, ""
	r.Out.URL.RawQuery = r.In.URL.RawQuery
	// No switch of protocols but in tunnel: a guest cannot start one itself.
	r.Out.Header.Del("Upgrade")
	r.Out.Header.Del("Connection")
}

// byTarget sends each request over its own workspace's link.
type byTarget struct{}

func (byTarget) RoundTrip(r *http.Request) (*http.Response, error) {
	t, ok := r.Context().Value(targetKey{}).(target)
	if !ok {
		return nil, errors.New("request to an agent names no workspace")
	}
	return t.transport.RoundTrip(r)
}

// WorkspaceHeader on an agent's answer is the id of its workspace, so that a
// caller who knows it by name can stay with it over a rename.
const WorkspaceHeader = "Agentiso-Workspace"

// guardStream says whose answer it is, and lets a Connect stream end with an
// error when the link breaks.
func (p *agentProxy) guardStream(res *http.Response) error {
	ctx := res.Request.Context()
	t, _ := ctx.Value(targetKey{}).(target)
	res.Header.Set(WorkspaceHeader, t.id)
	codec, ok := strings.CutPrefix(res.Header.Get("Content-Type"), "application/connect+")
	if !ok || (codec != "proto" && codec != "json") || res.StatusCode != http.StatusOK {
		return nil
	}
	res.Header.Del("Content-Length")
	res.ContentLength = -1
	res.Body = newFrameGuard(res.Body, func(err error) *fault.Error {
		f := p.explain(ctx, t, err)
		if !gone(ctx, err) {
			callOf(ctx).err = f
		}
		return f
	})
	return nil
}

// fail answers a call that did not reach the agent, or had no proper answer.
func (p *agentProxy) fail(w http.ResponseWriter, r *http.Request, err error) {
	t, _ := r.Context().Value(targetKey{}).(target)
	p.s.writeError(w, r, p.explain(r.Context(), t, err))
}

// explain turns the error of a link into what users read.
func (p *agentProxy) explain(ctx context.Context, t target, err error) *fault.Error {
	if f, ok := errors.AsType[*fault.Error](err); ok {
		// A guest that is held gives no sign of life either.
		if _, _, err := p.s.o.Workspaces.Agent(ctx, t.id); fault.Is(err, fault.NoSpace) {
			return fault.As(err)
		}
		return f
	}
	if ctx.Err() != nil {
		cause := context.Cause(ctx)
		return p.s.faultOf(ctx, cause)
	}
	return fault.New(fault.Unavailable, "the agent of workspace %s broke off: %w", t.workspace, printable(err)).
		WithNext("See `agentiso info %s` for its state and `agentiso logs %s` for its console.", t.workspace, t.workspace)
}

var unprintable = regexp.MustCompile(`[^\x20-\x7e]+`)

// printable bounds what a guest can put into a message: errors of net/http
// quote what was received.
func printable(err error) error {
	const limit = 200
	s := unprintable.ReplaceAllString(err.Error(), "?")
	if len(s) > limit {
		s = s[:limit] + "…"
	}
	return errors.New(s)
}
