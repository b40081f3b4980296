package telemetry

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/instrumentation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/goleak"

	"go.opentelemetry.io/otel/codes"

	"github.com/agentiso/agentiso/internal/fault"
)

var update = flag.Bool("update", false, "rewrite golden files")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func env(vars ...string) func(string) string {
	m := map[string]string{}
	for _, v := range vars {
		k, x, _ := strings.Cut(v, "=")
		m[k] = x
	}
	return func(k string) string { return m[k] }
}

// collector is a server that takes traces.
type collector struct {
	*httptest.Server
	mu     sync.Mutex
	spans  []otlpSpan
	header http.Header
	path   string
	refuse int // this many requests with 503
}

func newCollector(t *testing.T) *collector {
	c := &collector{}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.header, c.path = r.Header, r.URL.Path
		if c.refuse > 0 {
			c.refuse--
			http.Error(w, "later", http.StatusServiceUnavailable)
			return
		}
		body := io.Reader(r.Body)
		if r.Header.Get("Content-Encoding") == "gzip" {
			z, err := gzip.NewReader(r.Body)
			if err != nil {
				t.Error(err)
				return
			}
			body = z
		}
		var got otlpTraces
		if err := json.NewDecoder(body).Decode(&got); err != nil {
			t.Error(err)
		}
		for _, rs := range got.ResourceSpans {
			for _, ss := range rs.ScopeSpans {
				c.spans = append(c.spans, ss.Spans...)
			}
		}
		_, _ = w.Write([]byte("{}"))
	}))
	t.Cleanup(c.Close)
	return c
}

func metrics(t *testing.T, tel *Telemetry) string {
	t.Helper()
	w := httptest.NewRecorder()
	tel.Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
	return w.Body.String()
}

func TestStepsAreCountedAndTraced(t *testing.T) {
	c := newCollector(t)
	tel, err := New(t.Context(), Options{Version: "v1", Getenv: env(
		"OTEL_EXPORTER_OTLP_ENDPOINT="+c.URL+"/base", "OTEL_EXPORTER_OTLP_HEADERS=authorization=Bearer%20x, a=b", "OTEL_EXPORTER_OTLP_COMPRESSION=gzip")})
	if err != nil {
		t.Fatal(err)
	}
	h := tel.Middleware(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		ctx, end := tel.Recorder().Begin(r.Context(), "create", "disk", "w1")
		_, endInner := tel.Recorder().Begin(ctx, "create", "inner", "w1")
		endInner(nil)
		end(nil)
		_, end = tel.Recorder().Begin(r.Context(), "create", "boot", "w1")
		end(fault.New(fault.BootFailed, "no answer"))
		end(nil) // ignored
	}))
	r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/agentiso.v1.WorkspaceService/Create", nil)
	r.Header.Set("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	h.ServeHTTP(httptest.NewRecorder(), r)
	if err := tel.Close(); err != nil {
		t.Fatal(err)
	}

	text := metrics(t, tel)
	for _, want := range []string{
		`agentiso_step_seconds_count{op="create",outcome="ok",step="disk"} 1`,
		`agentiso_step_seconds_count{op="create",outcome="boot_failed",step="boot"} 1`,
		`agentiso_build_info{goversion="go`, `version="v1"} 1`, "go_goroutines", "process_open_fds",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("metrics lack %s", want)
		}
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	names := map[string]string{"b7ad6b7169203331": "caller"}
	for _, s := range c.spans {
		names[s.SpanID] = s.Name
	}
	got := map[string]string{}
	for _, s := range c.spans {
		if s.TraceID != "0af7651916cd43dd8448eb211c80319c" {
			t.Errorf("span %s is in another trace", s.Name)
		}
		got[s.Name] = fmt.Sprintf("below %s, status %d", names[s.ParentSpanID], s.Status.Code)
	}
	want := map[string]string{
		"agentiso.v1.WorkspaceService/Create": "below caller, status 0",
		"create.disk":                         "below agentiso.v1.WorkspaceService/Create, status 0",
		"create.inner":                        "below create.disk, status 0",
		"create.boot":                         "below agentiso.v1.WorkspaceService/Create, status 2",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("spans (-want +got):\n%s", diff)
	}
	if c.path != "/base/v1/traces" || c.header.Get("Authorization") != "Bearer x" || c.header.Get("A") != "b" || c.header.Get("Content-Type") != "application/json" {
		t.Errorf("request to %s with %v", c.path, c.header)
	}
}

func TestOffByDefault(t *testing.T) {
	for _, vars := range [][]string{
		{}, {"OTEL_TRACES_EXPORTER=none", "OTEL_EXPORTER_OTLP_ENDPOINT=http://x"}, {"OTEL_SDK_DISABLED=true", "OTEL_EXPORTER_OTLP_ENDPOINT=http://x"},
	} {
		tel, err := New(t.Context(), Options{Getenv: env(vars...)})
		if err != nil {
			t.Fatal(err)
		}
		ctx, end := tel.Recorder().Begin(t.Context(), "create", "disk", "w1")
		end(nil)
		if trace.SpanContextFromContext(ctx).IsValid() || tel.provider != nil {
			t.Errorf("%v: tracing is on", vars)
		}
		if err := tel.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestBadEnvironment(t *testing.T) {
	for _, v := range []string{
		"OTEL_TRACES_EXPORTER=zipkin", "OTEL_EXPORTER_OTLP_ENDPOINT=collector:4318", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=unix:///x",
		"OTEL_EXPORTER_OTLP_PROTOCOL=grpc", "OTEL_EXPORTER_OTLP_HEADERS=novalue", "OTEL_EXPORTER_OTLP_TIMEOUT=10s",
		"OTEL_EXPORTER_OTLP_COMPRESSION=zstd", "OTEL_EXPORTER_OTLP_CERTIFICATE=/nonexistent", "OTEL_EXPORTER_OTLP_CLIENT_KEY=/k",
	} {
		vars := []string{v}
		if !strings.Contains(v, "ENDPOINT") && !strings.Contains(v, "EXPORTER=") {
			vars = append(vars, "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:1")
		}
		name, _, _ := strings.Cut(v, "=")
		_, err := New(t.Context(), Options{Getenv: env(vars...)})
		if f := fault.As(err); err == nil || f.Kind != fault.Invalid || !strings.Contains(f.Msg, name) || f.Next == "" {
			t.Errorf("%s: %v", v, err)
		}
	}
	s, err := readEnvironment(env("OTEL_TRACES_EXPORTER=otlp"))
	if err != nil || s.endpoint != "http://localhost:4318/v1/traces" || s.timeout != 10*time.Second {
		t.Errorf("defaults: %+v, %v", s, err)
	}
	s, err = readEnvironment(env("OTEL_EXPORTER_OTLP_ENDPOINT=http://a", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=https://b/x", "OTEL_EXPORTER_OTLP_TIMEOUT=250"))
	if err != nil || s.endpoint != "https://b/x" || s.timeout != 250*time.Millisecond {
		t.Errorf("variables for traces: %+v, %v", s, err)
	}
}

// TestCollectorAway: what cannot be exported is said once and holds nothing up.
func TestCollectorAway(t *testing.T) {
	c := newCollector(t)
	var log bytes.Buffer
	s, err := readEnvironment(env("OTEL_EXPORTER_OTLP_ENDPOINT=" + c.URL))
	if err != nil {
		t.Fatal(err)
	}
	e, err := newExporter(*s, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = e.Shutdown(t.Context()) }()
	spans := sampleSpans()
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // the time for it is over
	for range 3 {
		if err := e.ExportSpans(ctx, spans); err != nil {
			t.Error(err)
		}
	}
	c.refuse = 1 // tried again
	for range 2 {
		if err := e.ExportSpans(t.Context(), spans); err != nil {
			t.Error(err)
		}
	}
	if n := strings.Count(log.String(), "traces are dropped"); n != 1 {
		t.Errorf("the failure was logged %d times:\n%s", n, log.String())
	}
	if n := strings.Count(log.String(), "exported again"); n != 1 {
		t.Errorf("the recovery was logged %d times:\n%s", n, log.String())
	}
	if len(c.spans) != 2*len(spans) {
		t.Errorf("%d spans arrived, want %d", len(c.spans), 2*len(spans))
	}
}

func sampleSpans() []sdktrace.ReadOnlySpan {
	at := time.Unix(1_700_000_000, 42).UTC()
	sc := func(b byte) trace.SpanContext {
		return trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1: b}, SpanID: trace.SpanID{2: b}, TraceFlags: trace.FlagsSampled})
	}
	return tracetest.SpanStubs{
		{
			Name: "create.disk", SpanContext: sc(1), Parent: sc(2), SpanKind: trace.SpanKindInternal, StartTime: at, EndTime: at.Add(time.Second),
			Attributes: []attribute.KeyValue{
				attribute.String("s", "a\"b"), attribute.Int64("i", 1<<60), attribute.Bool("b", true), attribute.Float64("f", .5),
				attribute.StringSlice("l", []string{"x", "y"}), attribute.IntSlice("n", []int{1, 2}),
			},
			Events: []sdktrace.Event{{Name: "exception", Time: at, Attributes: []attribute.KeyValue{attribute.String("exception.message", "no")}}},
			Links:  []sdktrace.Link{{SpanContext: sc(9)}},
			Status: sdktrace.Status{Code: codes.Error, Description: "internal"}, Resource: resource.NewSchemaless(attribute.String("service.name", "agentiso")),
			InstrumentationScope: instrumentation.Scope{Name: scope, Version: "v1"},
		},
		{
			Name: "call", SpanContext: sc(2), SpanKind: trace.SpanKindServer, StartTime: at, EndTime: at, Status: sdktrace.Status{Code: codes.Ok},
			InstrumentationScope: instrumentation.Scope{Name: scope, Version: "v1"},
		},
	}.Snapshots()
}

func TestWireFormat(t *testing.T) {
	got, err := json.MarshalIndent(encode(sampleSpans()), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	golden := filepath.Join("testdata", "traces.json")
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("wire format (-want +got):\n%s", diff)
	}
}

func TestLogger(t *testing.T) {
	var b bytes.Buffer
	log := NewLogger(&b, slog.LevelInfo, "json").With("workspace", "w1").WithGroup("g")
	sc := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: trace.FlagsSampled})
	log.Debug("not this")
	log.InfoContext(trace.ContextWithSpanContext(t.Context(), sc), "done", "dur", 1500*time.Millisecond, "err", errors.New("no"))
	var got map[string]any
	if err := json.Unmarshal(b.Bytes(), &got); err != nil {
		t.Fatalf("%v: %s", err, b.String())
	}
	delete(got, "time")
	want := map[string]any{"level": "INFO", "msg": "done", "workspace": "w1", "g": map[string]any{
		"dur": "1.5s", "err": "no", "trace_id": sc.TraceID().String(), "span_id": sc.SpanID().String(),
	}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("line (-want +got):\n%s", diff)
	}
	b.Reset()
	NewLogger(&b, slog.LevelDebug, "text").Debug("x", "dur", time.Second)
	if !strings.Contains(b.String(), "level=DEBUG msg=x dur=1s") {
		t.Errorf("text line: %s", b.String())
	}
}
