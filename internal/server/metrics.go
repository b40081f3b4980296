package server

import (
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/agentiso/agentiso/internal/fault"
)

type metrics struct {
	calls *prometheus.HistogramVec
}

// newMetrics registers this package's metrics with reg, which may be nil.
func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{calls: prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "agentiso_api_call_seconds",
		Help: "Time from a call's request to the end of its answer, by operation and outcome.",
		// From a lookup to an image build.
		Buckets: []float64{.001, .005, .02, .1, .25, .5, 1, 2.5, 5, 10, 30, 120, 600},
	}, []string{"op", "outcome"})}
	if reg != nil {
		reg.MustRegister(m.calls)
	}
	return m
}

// observe counts c. Names that callers choose freely share one label: a
// metric must not grow with them.
func (m *metrics) observe(c *call, status int, took time.Duration) {
	op := c.op
	switch {
	case strings.HasSuffix(op, "/"), status == 404 && !strings.HasPrefix(op, "agent/"):
		op = "other"
	}
	outcome := "ok"
	switch {
	case c.err != nil:
		outcome = string(fault.As(c.err).Kind)
	case status >= 500:
		outcome = "error"
	case status >= 400:
		outcome = "rejected"
	}
	m.calls.WithLabelValues(op, outcome).Observe(took.Seconds())
}
