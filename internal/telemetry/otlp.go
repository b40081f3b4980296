package telemetry

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// exporter sends spans by OTLP/HTTP in its JSON form (OTLP specification 1.0,
// "JSON Protobuf Encoding": ids in hexadecimal, 64-bit integers as strings,
// enumerations as numbers).
type exporter struct {
	set    settings
	log    *slog.Logger
	client *http.Client

	mu     sync.Mutex
	failed bool // the last export: the log tells of changes only
}

func newExporter(set settings, log *slog.Logger) (*exporter, error) {
	tr, ok := http.DefaultTransport.(*http.Transport)
	if !ok {
		return nil, fmt.Errorf("export traces: default transport is a %T", http.DefaultTransport)
	}
	tr = tr.Clone()
	if set.roots != nil {
		tr.TLSClientConfig = &tls.Config{RootCAs: set.roots, MinVersion: tls.VersionTLS12}
	}
	return &exporter{set: set, log: log, client: &http.Client{Transport: tr}}, nil
}

// attempts and pause: a batch is sent again after 0.5 and 1 s where the
// specification allows it, and then dropped.
const attempts = 3

const pause = 500 * time.Millisecond

// ExportSpans implements [sdktrace.SpanExporter]. Its failure is logged here
// and reported to nobody: the SDK would print it.
func (e *exporter) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	ctx, cancel := context.WithTimeout(ctx, e.set.timeout)
	defer cancel()
	body, err := e.encode(spans)
	for try := 1; err == nil; try++ {
		var again bool
		again, err = e.post(ctx, body)
		if err == nil || !again || try == attempts {
			break
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause << (try - 1)):
			err = nil
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	switch failed := err != nil; {
	case failed && !e.failed:
		e.log.Warn("traces are dropped", "endpoint", e.set.endpoint, "spans", len(spans), "err", err)
	case !failed && e.failed:
		e.log.Info("traces are exported again", "endpoint", e.set.endpoint)
	}
	e.failed = err != nil
	return nil
}

// Shutdown implements [sdktrace.SpanExporter].
func (e *exporter) Shutdown(context.Context) error {
	e.client.CloseIdleConnections()
	return nil
}

func (e *exporter) encode(spans []sdktrace.ReadOnlySpan) ([]byte, error) {
	b, err := json.Marshal(encode(spans))
	if err != nil || !e.set.gzip {
		return b, err
	}
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	if _, err := w.Write(b); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return z.Bytes(), nil
}

// post sends one batch; again says that the server asks to be tried again.
func (e *exporter) post(ctx context.Context, body []byte) (again bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, e.set.endpoint, bytes.NewReader(body))
	if err != nil {
		return false, err
	}
	for k, v := range e.set.headers {
		req.Header[k] = v
	}
	req.Header.Set("Content-Type", "application/json")
	if e.set.gzip {
		req.Header.Set("Content-Encoding", "gzip")
	}
	resp, err := e.client.Do(req)
	if err != nil {
		return true, err
	}
	defer resp.Body.Close()
	answer, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	switch resp.StatusCode {
	case http.StatusOK, http.StatusAccepted, http.StatusNoContent:
		var partial struct {
			PartialSuccess struct {
				RejectedSpans json.Number `json:"rejectedSpans"`
				ErrorMessage  string      `json:"errorMessage"`
			} `json:"partialSuccess"`
		}
		if json.Unmarshal(answer, &partial) == nil && partial.PartialSuccess.ErrorMessage != "" {
			return false, fmt.Errorf("collector rejected %s spans: %s", partial.PartialSuccess.RejectedSpans, partial.PartialSuccess.ErrorMessage)
		}
		return false, nil
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		again = true
	}
	return again, fmt.Errorf("collector answered %s: %.200q", resp.Status, answer)
}

// The JSON form, as far as this program fills it.
type (
	otlpTraces struct {
		ResourceSpans []otlpResourceSpans `json:"resourceSpans"`
	}
	otlpResourceSpans struct {
		Resource   otlpResource     `json:"resource"`
		ScopeSpans []otlpScopeSpans `json:"scopeSpans"`
	}
	otlpResource struct {
		Attributes []otlpAttribute `json:"attributes"`
	}
	otlpScopeSpans struct {
		Scope otlpScope  `json:"scope"`
		Spans []otlpSpan `json:"spans"`
	}
	otlpScope struct {
		Name    string `json:"name"`
		Version string `json:"version,omitempty"`
	}
	otlpSpan struct {
		TraceID      string          `json:"traceId"`
		SpanID       string          `json:"spanId"`
		ParentSpanID string          `json:"parentSpanId,omitempty"`
		TraceState   string          `json:"traceState,omitempty"`
		Name         string          `json:"name"`
		Kind         int             `json:"kind"`
		Start        string          `json:"startTimeUnixNano"`
		End          string          `json:"endTimeUnixNano"`
		Attributes   []otlpAttribute `json:"attributes,omitempty"`
		Events       []otlpEvent     `json:"events,omitempty"`
		Links        []otlpLink      `json:"links,omitempty"`
		Status       otlpStatus      `json:"status"`
	}
	otlpEvent struct {
		Time       string          `json:"timeUnixNano"`
		Name       string          `json:"name"`
		Attributes []otlpAttribute `json:"attributes,omitempty"`
	}
	otlpLink struct {
		TraceID    string          `json:"traceId"`
		SpanID     string          `json:"spanId"`
		Attributes []otlpAttribute `json:"attributes,omitempty"`
	}
	otlpStatus struct {
		Code    int    `json:"code,omitempty"`
		Message string `json:"message,omitempty"`
	}
	otlpAttribute struct {
		Key   string         `json:"key"`
		Value map[string]any `json:"value"`
	}
)

// encode groups spans by their scope. All have the one provider's resource.
func encode(spans []sdktrace.ReadOnlySpan) otlpTraces {
	if len(spans) == 0 {
		return otlpTraces{}
	}
	rs := otlpResourceSpans{Resource: otlpResource{attributes(spans[0].Resource().Attributes())}}
	at := map[otlpScope]int{}
	for _, s := range spans {
		sc := otlpScope{s.InstrumentationScope().Name, s.InstrumentationScope().Version}
		i, ok := at[sc]
		if !ok {
			i = len(rs.ScopeSpans)
			at[sc] = i
			rs.ScopeSpans = append(rs.ScopeSpans, otlpScopeSpans{Scope: sc})
		}
		rs.ScopeSpans[i].Spans = append(rs.ScopeSpans[i].Spans, encodeSpan(s))
	}
	return otlpTraces{[]otlpResourceSpans{rs}}
}

func encodeSpan(s sdktrace.ReadOnlySpan) otlpSpan {
	o := otlpSpan{
		TraceID: s.SpanContext().TraceID().String(), SpanID: s.SpanContext().SpanID().String(), TraceState: s.SpanContext().TraceState().String(),
		Name: s.Name(), Kind: int(s.SpanKind()), // the same numbers in both
		Start: nanos(s.StartTime()), End: nanos(s.EndTime()), Attributes: attributes(s.Attributes()),
		Status: otlpStatus{Message: s.Status().Description},
	}
	if p := s.Parent(); p.SpanID().IsValid() {
		o.ParentSpanID = p.SpanID().String()
	}
	switch s.Status().Code { // the two orders differ
	case codes.Ok:
		o.Status.Code = 1
	case codes.Error:
		o.Status.Code = 2
	}
	for _, e := range s.Events() {
		o.Events = append(o.Events, otlpEvent{nanos(e.Time), e.Name, attributes(e.Attributes)})
	}
	for _, l := range s.Links() {
		o.Links = append(o.Links, otlpLink{l.SpanContext.TraceID().String(), l.SpanContext.SpanID().String(), attributes(l.Attributes)})
	}
	return o
}

func nanos(t time.Time) string { return strconv.FormatInt(t.UnixNano(), 10) }

func attributes(kvs []attribute.KeyValue) []otlpAttribute {
	var all []otlpAttribute
	for _, kv := range kvs {
		all = append(all, otlpAttribute{string(kv.Key), value(kv.Value)})
	}
	return all
}

func value(v attribute.Value) map[string]any {
	switch v.Type() {
	case attribute.BOOL:
		return map[string]any{"boolValue": v.AsBool()}
	case attribute.INT64:
		return map[string]any{"intValue": strconv.FormatInt(v.AsInt64(), 10)}
	case attribute.FLOAT64:
		return map[string]any{"doubleValue": v.AsFloat64()}
	case attribute.STRINGSLICE:
		items := []map[string]any{}
		for _, s := range v.AsStringSlice() {
			items = append(items, map[string]any{"stringValue": s})
		}
		return map[string]any{"arrayValue": map[string]any{"values": items}}
	}
	// The rest of the lists, which this program does not use, as text.
	return map[string]any{"stringValue": v.String()}
}
