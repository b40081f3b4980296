package workspace

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	guestv1 "github.com/agentiso/agentiso/api/agentiso/guest/v1"
	"github.com/agentiso/agentiso/api/agentiso/guest/v1/guestv1connect"
	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// world fakes every collaborator and remembers what exists, so that a test can
// ask what is left rather than what was called. It outlives the Service that
// uses it, as a host outlives a daemon.
type world struct {
	mu       sync.Mutex
	records  map[string]*domain.Workspace
	disks    map[string]bool
	slots    map[string]bool
	machines map[string]*machine
	consoles map[string]string
	links    map[string]bool
	nextPID  int

	failAt     string // the effect that happens and then reports a failure
	full       bool   // records cannot change while there are disks
	guestDead  bool   // machines start, agents never answer
	configures int
	refuse     error  // what Configure answers
	drops      int    // how many Configure calls the link loses
	onShutdown func() // called while a guest shuts down
}

type machine struct {
	p    domain.Process
	done chan struct{}
	exit domain.Exit
}

func newWorld() *world {
	return &world{
		records: map[string]*domain.Workspace{}, disks: map[string]bool{}, slots: map[string]bool{},
		machines: map[string]*machine{}, consoles: map[string]string{}, links: map[string]bool{}, nextPID: 100,
	}
}

var errInjected = errors.New("injected")

// left lists everything that exists, for comparison.
func (w *world) left() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []string
	for id := range w.records {
		all = append(all, "record "+id+" "+string(w.records[id].State))
	}
	for id := range w.disks {
		all = append(all, "disk "+id)
	}
	for id := range w.slots {
		all = append(all, "slot "+id)
	}
	for id, m := range w.machines {
		select {
		case <-m.done:
		default:
			all = append(all, "machine "+id)
		}
	}
	for id := range w.consoles {
		all = append(all, "console "+id)
	}
	for id := range w.links {
		all = append(all, "link "+id)
	}
	slices.Sort(all)
	return all
}

// view is a world as one daemon sees it. After dead nothing it does has an
// effect: the daemon was killed.
type view struct {
	*world
	t    *testing.T
	dead bool
	gone chan struct{}
}

func (v *view) kill() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.dead = true
	v.links = map[string]bool{} // descriptors die with their process
	close(v.gone)
}

// do runs the effect f under the world's lock unless the daemon is dead.
func (v *view) do(effect string, f func()) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.dead {
		return errors.New("daemon is dead")
	}
	f()
	if v.failAt == effect {
		return errInjected
	}
	return nil
}

type fakeDisks struct{ *view }

func (d fakeDisks) Create(_ context.Context, id string, _ domain.Disk, size int64) (domain.Disk, error) {
	err := d.do("disk", func() { d.disks[id] = true })
	return domain.Disk{Path: "/disks/" + id, Format: domain.QCOW2, SizeBytes: size}, err
}

func (d fakeDisks) Remove(ctx context.Context, id string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return d.do("disk remove", func() { delete(d.disks, id) })
}

func (d fakeDisks) Own(context.Context, string, int) error { return d.do("own", func() {}) }

func (d fakeDisks) UsedBytes(context.Context, string) (int64, error) { return 4096, nil }

func (d fakeDisks) List(context.Context) ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Collect(maps.Keys(d.disks)), nil
}

type fakeNetworks struct{ *view }

func (n fakeNetworks) Attach(_ context.Context, id string, _ domain.NetworkPolicy, prev domain.NetworkSlot) (domain.NetworkSlot, error) {
	slot := domain.NetworkSlot{Driver: "fake", MAC: "02:00:00:00:00:01"}
	if prev.MAC != "" {
		slot = prev
	}
	return slot, n.do("network", func() { n.slots[id] = true })
}

func (n fakeNetworks) Detach(ctx context.Context, id string, _ domain.NetworkSlot) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return n.do("detach", func() { delete(n.slots, id) })
}

func (n fakeNetworks) List(context.Context) ([]string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Collect(maps.Keys(n.slots)), nil
}

type fakeImages struct{ *view }

func (fakeImages) Image(_ context.Context, ref string) (domain.Image, error) {
	if ref == "missing" {
		return domain.Image{}, fault.New(fault.NotFound, "no image %q", ref)
	}
	return domain.Image{
		Digest: "sha256:1", Names: []string{"dev"}, SizeBytes: 1 << 20, User: "user",
		Env: map[string]string{"FROM": "image", "BOTH": "image"},
	}, nil
}

func (fakeImages) Boot(context.Context, string) (domain.Boot, error) {
	return domain.Boot{Kernel: domain.Kernel{Name: "lean"}}, nil
}

type fakeMachines struct{ *view }

func (m fakeMachines) Start(_ context.Context, spec domain.MachineSpec) (domain.Process, error) {
	var p domain.Process
	err := m.do("machine", func() {
		m.nextPID++
		p = domain.Process{PID: m.nextPID, StartTicks: uint64(m.nextPID), RunDir: "/run/" + spec.ID}
		m.machines[spec.ID] = &machine{p: p, done: make(chan struct{})}
		m.consoles[spec.ID] = "Linux version 6.12\r\n\x1b[31mno init found\x1b[0m\n"
	})
	return p, err
}

func (m fakeMachines) Adopt(_ context.Context, id string, p domain.Process) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	got := m.machines[id]
	if got == nil || got.p.PID != p.PID || isDone(got.done) {
		return domain.ErrNoMachine
	}
	return nil
}

func isDone(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func (m fakeMachines) Done(id string) <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	if got := m.machines[id]; got != nil {
		return got.done
	}
	c := make(chan struct{})
	close(c)
	return c
}

func (m fakeMachines) Exit(id string) domain.Exit {
	m.mu.Lock()
	defer m.mu.Unlock()
	if got := m.machines[id]; got != nil {
		return got.exit
	}
	return domain.Exit{Reason: "never started"}
}

func (m fakeMachines) Kill(ctx context.Context, id string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return m.do("kill", func() { m.end(id, domain.Exit{Reason: "killed"}) })
}

// end stops the machine of id; the world's lock is held.
func (w *world) end(id string, exit domain.Exit) {
	if got := w.machines[id]; got != nil && !isDone(got.done) {
		got.exit = exit
		close(got.done)
	}
}

// dies ends the machine of id as from outside.
func (w *world) dies(id string, exit domain.Exit) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.end(id, exit)
}

func (m fakeMachines) List(context.Context) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var ids []string
	for id, got := range m.machines {
		if !isDone(got.done) {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

type fakeConsoles struct{ *view }

func (c fakeConsoles) Tail(id string, n int) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	b := []byte(c.consoles[id])
	return b[max(0, len(b)-n):]
}

func (c fakeConsoles) Follow(_ context.Context, id string, tail int64, fn func([]byte) error) error {
	return fn(c.Tail(id, int(tail)))
}

func (c fakeConsoles) RemoveConsole(id string) error {
	return c.do("console remove", func() { delete(c.consoles, id) })
}

func (c fakeConsoles) ListConsoles(context.Context) ([]string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Collect(maps.Keys(c.consoles)), nil
}

type fakeGuests struct{ *view }

func (g fakeGuests) Open(id string, _ domain.Endpoint) error {
	return g.do("link", func() { g.links[id] = true })
}

func (g fakeGuests) Close(id string) {
	_ = g.do("link close", func() { delete(g.links, id) })
}

// Transport reaches a fake agent in this process.
func (g fakeGuests) Transport(id string) http.RoundTripper {
	_, h := guestv1connect.NewGuestHandler(agent{view: g.view, id: id})
	return handlerTransport{h, g.view, id}
}

type handlerTransport struct {
	h  http.Handler
	v  *view
	id string
}

func (t handlerTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	t.v.mu.Lock()
	silent := t.v.guestDead
	m := t.v.machines[t.id]
	t.v.mu.Unlock()
	if m == nil || silent {
		var ended chan struct{}
		if m != nil {
			ended = m.done
		}
		select {
		case <-r.Context().Done():
			return nil, r.Context().Err()
		case <-ended:
			return nil, fault.New(fault.Unavailable, "machine ended")
		case <-t.v.gone:
			return nil, errors.New("daemon is dead")
		}
	}
	rec := httptest.NewRecorder()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	in := r.Clone(r.Context())
	in.Body = io.NopCloser(bytes.NewReader(body))
	t.h.ServeHTTP(rec, in)
	return rec.Result(), nil
}

type agent struct {
	guestv1connect.UnimplementedGuestHandler
	view *view
	id   string
}

func (a agent) Info(context.Context, *connect.Request[guestv1.InfoRequest]) (*connect.Response[guestv1.InfoResponse], error) {
	return connect.NewResponse(&guestv1.InfoResponse{BootNs: int64(time.Second)}), nil
}

func (a agent) Stats(context.Context, *connect.Request[guestv1.StatsRequest]) (*connect.Response[guestv1.StatsResponse], error) {
	return connect.NewResponse(&guestv1.StatsResponse{Processes: 3}), nil
}

func (a agent) Configure(_ context.Context, r *connect.Request[guestv1.ConfigureRequest]) (*connect.Response[guestv1.ConfigureResponse], error) {
	a.view.mu.Lock()
	defer a.view.mu.Unlock()
	a.view.configures++
	if a.view.drops > 0 {
		a.view.drops--
		return nil, connect.NewError(connect.CodeUnavailable, errors.New("link dropped"))
	}
	if len(r.Msg.GetRandomSeed()) < 32 || r.Msg.GetWallClockUnixNs() == 0 {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("no seed or clock"))
	}
	if a.view.refuse != nil {
		return nil, connect.NewError(connect.CodeInternal, a.view.refuse)
	}
	return connect.NewResponse(&guestv1.ConfigureResponse{}), nil
}

func (a agent) Shutdown(context.Context, *connect.Request[guestv1.ShutdownRequest]) (*connect.Response[guestv1.ShutdownResponse], error) {
	if a.view.onShutdown != nil {
		a.view.onShutdown()
	}
	a.view.dies(a.id, domain.Exit{Clean: true, Reason: "guest shut down"})
	return connect.NewResponse(&guestv1.ShutdownResponse{}), nil
}

type fakeRecords struct{ *view }

func (r fakeRecords) Insert(_ context.Context, w *domain.Workspace, limit int) error {
	var err error
	if e := r.do("insert", func() {
		if len(r.records) >= limit {
			err = fault.New(fault.Limit, "limit")
			return
		}
		r.records[w.ID] = clone(w)
	}); e != nil {
		r.mu.Lock() // a transaction: it fails whole
		delete(r.records, w.ID)
		r.mu.Unlock()
		return e
	}
	return err
}

func (r fakeRecords) Update(_ context.Context, w *domain.Workspace) error {
	r.mu.Lock()
	full := r.full && len(r.disks) > 0
	r.mu.Unlock()
	if full {
		return fault.New(fault.NoSpace, "the disk is full")
	}
	return r.do("update "+string(w.State), func() {
		if r.failAt != "update "+string(w.State) {
			r.records[w.ID] = clone(w)
		}
	})
}

func (r fakeRecords) Delete(_ context.Context, id string) error {
	return r.do("delete", func() { delete(r.records, id) })
}

func (r fakeRecords) List(context.Context) ([]*domain.Workspace, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []*domain.Workspace
	for _, w := range r.records {
		all = append(all, clone(w))
	}
	return all, nil
}

// daemon starts a Service over w, as a restarted daemon would.
func (w *world) daemon(t *testing.T, rec Recorder) (*Service, *view) {
	t.Helper()
	v := &view{world: w, t: t, gone: make(chan struct{})}
	s := New(Options{
		Disks: fakeDisks{v}, Networks: fakeNetworks{v}, Images: fakeImages{v}, Machines: fakeMachines{v},
		Consoles: fakeConsoles{v}, Guests: fakeGuests{v}, Records: fakeRecords{v}, Recorder: rec,
		Limits: Limits{
			MaxWorkspaces: 10, DefaultCPUs: 1, MaxCPUs: 4, DefaultMemoryMiB: 256, MaxMemoryMiB: 4096,
			DefaultDiskBytes: 1 << 30, MaxDiskBytes: 10 << 30,
		},
		DefaultInit: "fast", Link: domain.LinkSerial, BootTimeout: 5 * time.Second, UIDBase: 1000, UIDCount: 20,
		Log: slog.New(slog.DiscardHandler),
	})
	if err := s.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s, v
}

func sorted(s []string) []string {
	slices.Sort(s)
	return s
}
