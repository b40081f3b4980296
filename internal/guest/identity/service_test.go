package identity

import (
	"context"
	"errors"
	"log/slog"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	guestv1 "github.com/agentiso/agentiso/api/agentiso/guest/v1"
	"github.com/agentiso/agentiso/api/agentiso/guest/v1/guestv1connect"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// fakeSystem records instead of doing.
type fakeSystem struct {
	clock    time.Time
	hostname string
	seed     []byte
	resized  int
	fail     map[string]error
}

// newTest returns a Service on an empty root that does nothing to the host.
func newTest(t *testing.T, opt Options) (*Service, *fakeSystem) {
	t.Helper()
	if opt.Root == "" {
		opt.Root = t.TempDir()
	}
	if opt.Store == nil {
		opt.Store = NewStore(Snapshot{})
	}
	if opt.Interface == "" {
		opt.Interface = "none"
	}
	opt.Log = quiet()
	s := NewService(opt)
	f := &fakeSystem{fail: map[string]error{}}
	s.sys = system{
		setClock:    func(t time.Time) error { f.clock = t; return f.fail["clock"] },
		setHostname: func(n string) error { f.hostname = n; return f.fail["hostname"] },
		addEntropy:  func(b []byte) error { f.seed = append([]byte(nil), b...); return f.fail["entropy"] },
		resize:      func(string) (int64, error) { f.resized++; return 1 << 30, f.fail["resize"] },
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s, f
}

// withoutNetwork is a valid request that asks for no network.
func withoutNetwork() *guestv1.ConfigureRequest {
	m := complete()
	m.Mac, m.Address, m.Gateway, m.Mtu = "", "", "", 0
	return m
}

func wantError(t *testing.T, err error, code connect.Code, field, text string) {
	t.Helper()
	cerr, ok := errors.AsType[*connect.Error](err)
	if !ok || cerr.Code() != code || cerr.Meta().Get(FieldHeader) != field || !strings.Contains(cerr.Message(), text) {
		t.Errorf("error %v, want %v of field %q with %q", err, code, field, text)
	}
}

func TestConfigure(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("missing capability: root")
	}
	dir := t.TempDir()
	s, sys := newTest(t, Options{Root: dir, Store: NewStore(Snapshot{Env: map[string]string{"OLD": "1"}})})
	ctx := t.Context()
	m := withoutNetwork()
	m.GrowRoot = true
	m.RandomSeed = []byte(strings.Repeat("seed", 8))
	wall := time.Unix(0, m.WallClockUnixNs)
	res, err := s.Configure(ctx, connect.NewRequest(m))
	if err != nil {
		t.Fatal(err)
	}
	if res.Msg.RootBytes != 1<<30 || res.Msg.DurationNs <= 0 {
		t.Errorf("answer %v", res.Msg)
	}
	if string(sys.seed) != strings.Repeat("seed", 8) || sys.hostname != "ws-abc12345" || sys.resized != 1 {
		t.Errorf("system %+v", sys)
	}
	if d := sys.clock.Sub(wall); d < 0 || d > time.Minute {
		t.Errorf("clock set %v off", d)
	}
	for name, want := range map[string]string{
		"/etc/resolv.conf": "# Written by agentiso.\nnameserver 1.1.1.1\nnameserver 2606:4700::1111\n",
		"/etc/hostname":    "ws-abc12345\n",
		"/etc/hosts":       "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\tws-abc12345\t# agentiso\n",
		"/etc/machine-id":  "0123456789abcdef0123456789abcdef\n",
		"/run/machine-id":  "0123456789abcdef0123456789abcdef\n",
	} {
		if b, err := os.ReadFile(dir + name); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	got := s.opt.Store.Current()
	if got.Env["A"] != "b" || len(got.Env) != 1 || got.DefaultUser != "root" || got.Workdir != "/work" || got.AccessToken != "secret" || !got.Configured {
		t.Errorf("store %+v", got)
	}
	info, err := s.Info(ctx, connect.NewRequest(&guestv1.InfoRequest{}))
	if err != nil || !info.Msg.Configured || info.Msg.KernelRelease == "" || info.Msg.Protocol != Protocol {
		t.Errorf("info %v, %v", info, err)
	}

	// What is empty stays as it is.
	least := &guestv1.ConfigureRequest{RandomSeed: make([]byte, 32), WallClockUnixNs: m.WallClockUnixNs}
	if _, err := s.Configure(ctx, connect.NewRequest(least)); err != nil {
		t.Fatal(err)
	}
	if again := s.opt.Store.Current(); again.Env["A"] != "b" || again.Hostname != "ws-abc12345" || !again.Configured {
		t.Errorf("store %+v", again)
	}
}

func TestConfigureErrors(t *testing.T) {
	ctx := t.Context()
	broken := errors.New("it broke")
	for name, field := range map[string]string{"entropy": "random_seed", "clock": "wall_clock_unix_ns", "hostname": "hostname", "resize": "grow_root"} {
		s, sys := newTest(t, Options{Store: NewStore(Snapshot{Configured: true})})
		sys.fail[name] = broken
		m := withoutNetwork()
		m.GrowRoot = true
		_, err := s.Configure(ctx, connect.NewRequest(m))
		wantError(t, err, connect.CodeInternal, field, field+": ")
		if s.opt.Store.Current().Configured {
			t.Errorf("%s: still configured", name)
		}
		if name == "entropy" && !sys.clock.IsZero() {
			t.Error("went on without entropy")
		}
	}

	s, sys := newTest(t, Options{Store: NewStore(Snapshot{Configured: true})})
	m := complete()
	m.Hostname = "-"
	_, err := s.Configure(ctx, connect.NewRequest(m))
	wantError(t, err, connect.CodeInvalidArgument, "hostname", "hostname: ")
	_, err = s.Configure(ctx, connect.NewRequest(complete()))
	wantError(t, err, connect.CodeFailedPrecondition, "mac", "the machine has no network interface")
	m = complete()
	m.Mac, m.Mtu = "", 0
	_, err = s.Configure(ctx, connect.NewRequest(m))
	wantError(t, err, connect.CodeFailedPrecondition, "address", "the machine has no network interface")
	m = withoutNetwork()
	m.DefaultUser = "nobody-of-that-name"
	_, err = s.Configure(ctx, connect.NewRequest(m))
	wantError(t, err, connect.CodeFailedPrecondition, "default_user", "nobody-of-that-name")
	m = withoutNetwork()
	m.LinkKey = []byte("key")
	_, err = s.Configure(ctx, connect.NewRequest(m))
	wantError(t, err, connect.CodeFailedPrecondition, "link_key", "the link has no key")
	if !s.opt.Store.Current().Configured || sys.seed != nil {
		t.Error("a refused request changed something")
	}
}

// A hostile root must end Configure with an error that names the field.
func TestConfigureHostileFiles(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("missing capability: root")
	}
	dir := t.TempDir()
	if err := os.MkdirAll(dir+"/etc/resolv.conf/x", 0o755); err != nil {
		t.Fatal(err)
	}
	s, _ := newTest(t, Options{Root: dir})
	_, err := s.Configure(t.Context(), connect.NewRequest(withoutNetwork()))
	wantError(t, err, connect.CodeInternal, "dns", "replace /etc/resolv.conf: ")
}

func TestEntropy(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("missing capability: root")
	}
	if err := addEntropy([]byte(strings.Repeat("x", 64))); err != nil {
		t.Error(err)
	}
}

func TestStats(t *testing.T) {
	s, _ := newTest(t, Options{})
	res, err := s.Stats(t.Context(), connect.NewRequest(&guestv1.StatsRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	st := res.Msg
	if st.CpuCount == 0 || st.CpuUsedPercent <= 0 || st.CpuUsedPercent > 100 || st.MemoryTotalBytes <= st.MemoryUsedBytes || st.MemoryUsedBytes <= 0 ||
		st.DiskTotalBytes < st.DiskUsedBytes || st.DiskTotalBytes <= 0 || st.Processes == 0 || st.AgentRssBytes <= 0 || st.UptimeNs <= 0 || st.MemoryCacheBytes <= 0 {
		t.Errorf("%v", st)
	}
}

func TestCPUMeter(t *testing.T) {
	var m cpuMeter
	at := time.Now()
	for _, step := range []struct {
		now  cpuTimes
		d    time.Duration
		want float64
	}{
		{cpuTimes{25, 100}, 0, 25},
		{cpuTimes{90, 190}, cpuGap / 2, 25}, // too soon
		{cpuTimes{75, 200}, time.Second, 50},
		{cpuTimes{10, 20}, time.Second, 50}, // an older state was restored
		{cpuTimes{20, 30}, time.Second, 100},
	} {
		at = at.Add(step.d)
		if got := m.percent(step.now, at); got != step.want {
			t.Errorf("%+v: %v, want %v", step.now, got, step.want)
		}
	}
}

func FuzzParseProc(f *testing.F) {
	f.Add([]byte("cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 1 2 3 4\n"))
	f.Add([]byte("MemTotal: 12 kB\nMemFree:\n: 1\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if ct, _, err := parseCPU(b); err == nil && ct.busy > ct.total {
			t.Errorf("%+v", ct)
		}
		for k, v := range parseMeminfo(b) {
			if v < 0 {
				t.Errorf("%s: %d", k, v)
			}
		}
	})
}

func TestShutdownAnswersFirst(t *testing.T) {
	called := make(chan time.Duration, 2)
	s, _ := newTest(t, Options{PowerOff: func(_ context.Context, grace time.Duration) error {
		called <- grace
		return nil
	}})
	srv := httptest.NewServer(nil)
	defer srv.Close()
	_, h := guestv1connect.NewGuestHandler(s)
	srv.Config.Handler = h
	client := guestv1connect.NewGuestClient(srv.Client(), srv.URL)
	_, err := client.Shutdown(t.Context(), connect.NewRequest(&guestv1.ShutdownRequest{GraceMs: 60001}))
	if connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("error %v", err)
	}
	for range 2 { // the second one joins the first
		if _, err := client.Shutdown(t.Context(), connect.NewRequest(&guestv1.ShutdownRequest{GraceMs: 1500})); err != nil {
			t.Fatal(err)
		}
	}
	if grace := <-called; grace != 1500*time.Millisecond {
		t.Errorf("grace %v", grace)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if len(called) != 0 {
		t.Error("powered off twice")
	}
	srv.CloseClientConnections()
}
