package servertest

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	guestv1 "github.com/agentiso/agentiso/api/agentiso/guest/v1"
	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/workspace"
)

// Workspaces is a workspace service in memory. It keeps to the contract of the
// real one as far as callers can see it.
type Workspaces struct {
	// CreateGate, when set, is received from before a Create goes on.
	CreateGate chan struct{}
	// UndoGate, when set, is received from before a failed Create returns.
	UndoGate chan struct{}

	agent func() http.Handler

	mu      sync.Mutex
	all     map[string]*space
	created int
	logs    map[string][]byte
}

type space struct {
	rec     *domain.Workspace
	machine *machine
	ended   chan struct{}
}

func newWorkspaces(agent func() http.Handler) *Workspaces {
	return &Workspaces{agent: agent, all: map[string]*space{}, logs: map[string][]byte{}}
}

// Create makes a running workspace.
func (s *Workspaces) Create(ctx context.Context, o workspace.CreateOptions) (*domain.Workspace, workspace.Timings, error) {
	began := time.Now()
	if s.CreateGate != nil {
		select {
		case <-s.CreateGate:
		case <-ctx.Done():
			if s.UndoGate != nil {
				<-s.UndoGate
			}
			return nil, workspace.Timings{}, context.Cause(ctx)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sp := range s.all {
		if o.Name != "" && sp.rec.Name == o.Name {
			return nil, workspace.Timings{}, fault.New(fault.NameTaken, "a workspace named %s exists already", o.Name).
				WithNext("Choose another name, or destroy that one with `agentiso destroy %s`.", o.Name)
		}
	}
	if o.Image == "absent" {
		return nil, workspace.Timings{}, fault.New(fault.NotFound, "no image has the name or digest %q", o.Image).
			WithNext("See `agentiso image ls`, or build one with `agentiso image build`.")
	}
	s.created++
	w := &domain.Workspace{
		ID: fmt.Sprintf("%08d", 10000000+s.created), Name: o.Name, State: domain.Running,
		CreatedAt: began, StartedAt: time.Now(), Image: o.Image, Init: o.Init, CPUs: max(o.CPUs, 1),
		MemoryMiB: max(o.MemoryMiB, 256), DiskBytes: max(o.DiskBytes, 1<<30), Env: maps.Clone(o.Env),
		User: o.User, Workdir: o.Workdir, Policy: o.Policy, Ephemeral: o.Ephemeral,
	}
	if w.Name == "" {
		w.Name = "ws-" + w.ID
	}
	s.all[w.ID] = &space{rec: w, machine: newMachine(s.agent()), ended: make(chan struct{})}
	s.logs[w.ID] = []byte("booting " + w.Name + "\n")
	total := time.Since(began)
	return clone(w), workspace.Timings{Start: "cold", Total: total, Steps: []workspace.Step{{Name: "boot", Duration: total}}}, nil
}

func clone(w *domain.Workspace) *domain.Workspace {
	c := *w
	return &c
}

func (s *Workspaces) find(ref string) (*space, error) {
	var fits []*space
	for _, sp := range s.all {
		if sp.rec.ID == ref || sp.rec.Name == ref {
			return sp, nil
		}
		if ref != "" && strings.HasPrefix(sp.rec.ID, ref) {
			fits = append(fits, sp)
		}
	}
	switch len(fits) {
	case 0:
		return nil, fault.New(fault.NotFound, "no workspace has the name or id %q", ref).
			WithNext("See `agentiso ls` for those that exist.")
	case 1:
		return fits[0], nil
	}
	return nil, fault.New(fault.Ambiguous, "id prefix %q fits %d workspaces", ref, len(fits)).
		WithNext("Give more characters of the id, or the name.")
}

// Start runs a stopped workspace.
func (s *Workspaces) Start(_ context.Context, ref string) (*domain.Workspace, workspace.Timings, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sp, err := s.find(ref)
	if err != nil {
		return nil, workspace.Timings{}, err
	}
	if sp.machine != nil {
		return nil, workspace.Timings{}, fault.New(fault.WrongState, "workspace %s is running already", sp.rec.Name)
	}
	sp.machine, sp.ended = newMachine(s.agent()), make(chan struct{})
	sp.rec.State, sp.rec.StartedAt = domain.Running, time.Now()
	return clone(sp.rec), workspace.Timings{Start: "cold"}, nil
}

// Stop ends a workspace's machine.
func (s *Workspaces) Stop(_ context.Context, ref string, _ bool) (*domain.Workspace, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sp, err := s.find(ref)
	if err != nil {
		return nil, err
	}
	sp.end(domain.Stopped, "")
	return clone(sp.rec), nil
}

func (sp *space) end(state domain.State, reason string) {
	if sp.machine != nil {
		sp.machine.kill()
		sp.machine = nil
		close(sp.ended)
	}
	sp.rec.State, sp.rec.Reason, sp.rec.StartedAt = state, reason, time.Time{}
}

// Crash ends a machine as if its process had died.
func (s *Workspaces) Crash(ref string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sp, err := s.find(ref); err == nil {
		sp.end(domain.Failed, "QEMU was killed")
	}
}

// Destroy removes a workspace.
func (s *Workspaces) Destroy(_ context.Context, ref string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sp, err := s.find(ref)
	if err != nil {
		return "", err
	}
	sp.end(domain.Destroying, "")
	delete(s.all, sp.rec.ID)
	return sp.rec.ID, nil
}

// Rename renames a workspace.
func (s *Workspaces) Rename(_ context.Context, ref, name string) (*domain.Workspace, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sp, err := s.find(ref)
	if err != nil {
		return nil, err
	}
	sp.rec.Name = name
	return clone(sp.rec), nil
}

// Get returns a workspace.
func (s *Workspaces) Get(_ context.Context, ref string) (*domain.Workspace, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sp, err := s.find(ref)
	if err != nil {
		return nil, err
	}
	return clone(sp.rec), nil
}

// List returns all workspaces, oldest first.
func (s *Workspaces) List(context.Context) ([]*domain.Workspace, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*domain.Workspace
	for _, sp := range s.all {
		all = append(all, clone(sp.rec))
	}
	slices.SortFunc(all, func(a, b *domain.Workspace) int { return strings.Compare(a.ID, b.ID) })
	return all, nil
}

// UsersOf names the workspaces on an image; here an image's digest is its name.
func (s *Workspaces) UsersOf(digest string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for _, sp := range s.all {
		if sp.rec.Image == digest {
			names = append(names, sp.rec.Name)
		}
	}
	return names
}

// DiskUsedBytes is a constant.
func (s *Workspaces) DiskUsedBytes(context.Context, string) (int64, error) { return 192 << 10, nil }

// Logs sends what was printed; with follow it then waits for the machine's end.
func (s *Workspaces) Logs(ctx context.Context, ref string, follow bool, tailBytes int64, fn func([]byte) error) error {
	s.mu.Lock()
	sp, err := s.find(ref)
	if err != nil {
		s.mu.Unlock()
		return err
	}
	b := slices.Clone(s.logs[sp.rec.ID])
	ended := sp.ended
	s.mu.Unlock()
	if n := int(tailBytes); n > 0 && n < len(b) {
		b = b[len(b)-n:]
	}
	if err := fn(b); err != nil || !follow {
		return err
	}
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Stats invents figures.
func (s *Workspaces) Stats(ctx context.Context, ref string) (workspace.Stats, error) {
	if _, _, err := s.Agent(ctx, ref); err != nil {
		return workspace.Stats{}, err
	}
	return workspace.Stats{
		Guest: &guestv1.StatsResponse{UptimeNs: int64(90 * time.Second), CpuUsedPercent: 12.5, MemoryTotalBytes: 256 << 20, MemoryUsedBytes: 64 << 20,
			DiskTotalBytes: 1 << 30, DiskUsedBytes: 100 << 20, Processes: 7, AgentRssBytes: 9 << 20},
		Boot: 800 * time.Millisecond,
	}, nil
}

// Agent returns the way into a running workspace.
func (s *Workspaces) Agent(_ context.Context, ref string) (http.RoundTripper, *domain.Workspace, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sp, err := s.find(ref)
	if err != nil {
		return nil, nil, err
	}
	if sp.machine == nil {
		return nil, nil, fault.New(fault.WrongState, "workspace %s is %s, not running", sp.rec.Name, sp.rec.State).
			WithNext("Start it with `agentiso start %s`.", sp.rec.Name)
	}
	return sp.machine.transport, clone(sp.rec), nil
}

// Count returns how many workspaces exist.
func (s *Workspaces) Count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.all)
}

func (s *Workspaces) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sp := range s.all {
		sp.end(domain.Stopped, "")
	}
}

// machine serves an agent over in-memory connections that end with it.
type machine struct {
	transport *http.Transport
	server    *http.Server
	listener  *pipeListener
	served    chan struct{}
}

func newMachine(agent http.Handler) *machine {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	m := &machine{
		server:   &http.Server{Handler: agent, Protocols: &protocols, ReadHeaderTimeout: 10 * time.Second},
		listener: &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})},
		served:   make(chan struct{}),
	}
	m.transport = &http.Transport{
		DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return m.listener.dial(ctx) },
		DisableCompression: true,
	}
	go func() {
		defer close(m.served)
		_ = m.server.Serve(m.listener)
	}()
	return m
}

// kill breaks every connection, as the end of a machine does.
func (m *machine) kill() {
	_ = m.server.Close()
	m.listener.cut()
	m.transport.CloseIdleConnections()
	<-m.served
}
