// Package telemetry makes the daemon's logger, metrics registry and tracer, and
// the recorder that times the steps of operations into both.
//
// It holds no globals: whoever logs, counts or traces is handed what it needs.
// What is counted is each package's own business; this one registers the
// build's, the process's and the steps'.
//
// # Metrics
//
//	agentiso_build_info{version,goversion}           always 1
//	agentiso_step_seconds{op,step,outcome}           histogram; outcome is "ok" or the error's kind
//	go_*, process_*                                  the client library's collectors
//
// Labels come from small fixed sets; ids and names of workspaces are attributes
// of spans only.
//
// # Traces
//
// Spans are exported by OTLP over HTTP when the standard environment says so:
// OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set, or
// OTEL_TRACES_EXPORTER is "otlp". Otherwise tracing is off and costs nothing.
// In force are also OTEL_SDK_DISABLED, OTEL_SERVICE_NAME,
// OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER[_ARG] and OTEL_BSP_*, by the SDK,
// and the exporter's HEADERS, TIMEOUT, COMPRESSION and CERTIFICATE. The protocol
// is http/json whatever OTEL_EXPORTER_OTLP_PROTOCOL says, but for "grpc", which
// is an error: every collector that takes http/protobuf takes JSON, and the SDK's
// own exporter would add gRPC and 5.7 MB to the binary.
//
// A collector that cannot be reached never holds up or fails an operation: spans
// wait in a bounded queue and are then dropped, and the log says so once.
package telemetry

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

// scope names this module's spans.
const scope = "github.com/agentiso/agentiso"

// closeLimit bounds the last export.
const closeLimit = 5 * time.Second

// Options are a Telemetry's settings.
type Options struct {
	Version string // of the program
	Log     *slog.Logger
	Getenv  func(string) string // nil: os.Getenv
}

// Telemetry is a metrics registry and a tracer.
type Telemetry struct {
	registry *prometheus.Registry
	tracer   trace.Tracer
	recorder *Recorder
	provider *sdktrace.TracerProvider // nil while tracing is off
}

// New sets metrics and, if the environment asks for it, tracing up. A fault of
// kind invalid names the variable that is wrong.
func New(ctx context.Context, opt Options) (*Telemetry, error) {
	if opt.Getenv == nil {
		opt.Getenv = os.Getenv
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	t := &Telemetry{registry: prometheus.NewRegistry(), tracer: noop.NewTracerProvider().Tracer(scope)}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "agentiso_build_info", Help: "Always 1; the labels say what runs.",
		ConstLabels: prometheus.Labels{"version": opt.Version, "goversion": runtime.Version()},
	})
	build.Set(1)
	t.registry.MustRegister(build, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	set, err := readEnvironment(opt.Getenv)
	if err != nil {
		return nil, err
	}
	if set != nil {
		exp, err := newExporter(*set, opt.Log)
		if err != nil {
			return nil, err
		}
		attrs := []attribute.KeyValue{attribute.String("service.name", "agentiso"), attribute.String("service.version", opt.Version)}
		// What the environment says of the resource wins over the two above.
		res, err := resource.New(ctx, resource.WithAttributes(attrs...), resource.WithTelemetrySDK(), resource.WithFromEnv())
		if err != nil {
			return nil, fmt.Errorf("describe this program for traces: %w", err)
		}
		t.provider = sdktrace.NewTracerProvider(sdktrace.WithBatcher(exp), sdktrace.WithResource(res))
		t.tracer = t.provider.Tracer(scope, trace.WithInstrumentationVersion(opt.Version))
		opt.Log.Info("exporting traces", "endpoint", set.endpoint)
	}
	t.recorder = newRecorder(t.registry, t.tracer)
	return t, nil
}

// Recorder returns the recorder of steps.
func (t *Telemetry) Recorder() *Recorder { return t.recorder }

// Registry is where everybody's metrics are registered.
func (t *Telemetry) Registry() *prometheus.Registry { return t.registry }

// Tracer makes spans; they lead nowhere while tracing is off.
func (t *Telemetry) Tracer() trace.Tracer { return t.tracer }

// Handler serves the metrics to Prometheus.
func (t *Telemetry) Handler() http.Handler {
	return promhttp.HandlerFor(t.registry, promhttp.HandlerOpts{Registry: t.registry})
}

// Middleware puts a span around each request, below the caller's if it sent a
// W3C traceparent, so that the steps of one call are in one trace. next gets the
// response writer as it is, with all that it can do.
func (t *Telemetry) Middleware(next http.Handler) http.Handler {
	if t.provider == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := propagation.TraceContext{}.Extract(r.Context(), propagation.HeaderCarrier(r.Header))
		name := r.Method // paths of guests' files are no names for spans
		if strings.HasPrefix(r.URL.Path, "/agentiso.v1.") {
			name = strings.TrimPrefix(r.URL.Path, "/")
		}
		ctx, span := t.tracer.Start(ctx, name, trace.WithSpanKind(trace.SpanKindServer))
		defer span.End()
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// Close exports what is left, for five seconds at most.
func (t *Telemetry) Close() error {
	if t.provider == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeLimit)
	defer cancel()
	if err := t.provider.Shutdown(ctx); err != nil {
		return fmt.Errorf("export last traces: %w", err)
	}
	return nil
}
