package telemetry

import (
	"context"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/agentiso/agentiso/internal/fault"
)

// buckets reach from a hot step (a record is written in 0.3 ms) to a cold boot
// of an image with systemd under emulation (over 30 s).
var buckets = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120}

// Recorder times steps into a histogram and a span each.
type Recorder struct {
	seconds *prometheus.HistogramVec
	tracer  trace.Tracer
}

func newRecorder(reg prometheus.Registerer, tracer trace.Tracer) *Recorder {
	r := &Recorder{
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "agentiso_step_seconds", Help: "Time taken by the steps of operations on workspaces.", Buckets: buckets,
		}, []string{"op", "step", "outcome"}),
		tracer: tracer,
	}
	reg.MustRegister(r.seconds)
	return r
}

// Begin starts the clock of one step of op on a workspace. What the step does
// under the returned context belongs to its span. end is called once, with the
// step's error; later calls are ignored.
func (r *Recorder) Begin(ctx context.Context, op, step, workspace string) (stepCtx context.Context, end func(error)) {
	began := time.Now()
	ctx, span := r.tracer.Start(ctx, op+"."+step, trace.WithAttributes(attribute.String("agentiso.workspace", workspace)))
	var once sync.Once
	return ctx, func(err error) {
		once.Do(func() {
			outcome := "ok"
			if err != nil {
				outcome = string(fault.As(err).Kind)
				span.RecordError(err)
				span.SetStatus(codes.Error, outcome)
			}
			span.End()
			r.seconds.WithLabelValues(op, step, outcome).Observe(time.Since(began).Seconds())
		})
	}
}
