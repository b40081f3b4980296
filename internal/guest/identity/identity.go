// Package identity is who this guest is, and what the host asks of it as a
// machine: it serves agentiso.guest.v1.Guest and keeps the [Store] from which
// the rest of the agent takes its defaults.
//
// # Configure
//
// One message gives the guest its identity, at boot and after every restore.
// It is checked as a whole before anything is changed, and applied as one:
// calls take turns, and the answer comes when everything is in force. The
// first part that cannot be applied ends the call with an error that names its
// field (message "field: reason", metadata [FieldHeader]); what came before
// it in the order below stays, the Store says so ([Snapshot.Configured] is
// false), and the host is expected to throw the machine away.
//
// The order is: random_seed (the guest must not draw a random number that a
// sibling has drawn as well; nothing is applied if it fails), wall clock,
// mac, mtu, address, gateway, dns, hostname, machine_id, link_key,
// environment with default user, workdir and token, and grow_root.
//
// # The guest's files
//
// /etc belongs to the workspace's users, who may have put anything there.
// Files are replaced by rename, symbolic links are never followed out of the
// root, and never followed at all in the last component; see etc.go.
//
// It does not know transports, users' calls or processes.
package identity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	guestv1 "github.com/agentiso/agentiso/api/agentiso/guest/v1"
	"github.com/agentiso/agentiso/api/agentiso/guest/v1/guestv1connect"
)

// Protocol is the version of the agreement between host and agent.
const Protocol = 1

// FieldHeader is the metadata of an error of Configure that names the field.
const FieldHeader = "Agentiso-Field"

const (
	defaultGrace = 2 * time.Second
	maxGrace     = time.Minute
	// answerFlush is what an answer gets to leave the agent before the machine
	// is powered off: its way is a copy into the link's ring.
	answerFlush = 50 * time.Millisecond
)

// Options of a [Service]. Store and Log are required.
type Options struct {
	Log   *slog.Logger
	Store *Store
	// Version is the agent's build, InitMode "fast" or "image".
	Version, InitMode string
	// PowerOff ends processes, waits at most grace for them, syncs and powers
	// off. It returns only if it could not.
	PowerOff func(ctx context.Context, grace time.Duration) error
	// LinkKey replaces the key that connections must show; nil when the link
	// has none.
	LinkKey func(key []byte) error
	// Root is the guest's root directory; "" is "/".
	Root string
	// Interface is the name of the machine's network interface; "" finds it.
	Interface string
}

// Service implements [guestv1connect.GuestHandler].
type Service struct {
	opt     Options
	sys     system
	turn    chan struct{} // capacity 1: held by the Configure that applies
	freezer *freezer
	cpu     cpuMeter

	boot, init atomic.Int64

	ctx  context.Context // ends with Close; only for the power-off
	stop context.CancelFunc
	work sync.WaitGroup
	off  atomic.Bool // power-off has begun
}

var _ guestv1connect.GuestHandler = (*Service)(nil)

// system is what cannot be done in a test without doing it to the host.
type system struct {
	setClock    func(time.Time) error
	setHostname func(string) error
	addEntropy  func([]byte) error
	resize      func(root string) (int64, error)
}

// NewService returns a Service; it starts nothing.
func NewService(opt Options) *Service {
	if opt.Root == "" {
		opt.Root = "/"
	}
	ctx, stop := context.WithCancel(context.Background())
	return &Service{
		opt: opt,
		sys: system{
			setClock:    setClock,
			setHostname: func(s string) error { return unix.Sethostname([]byte(s)) },
			addEntropy:  addEntropy,
			resize:      growToDevice,
		},
		turn:    make(chan struct{}, 1),
		freezer: newFreezer(opt.Root, opt.Log),
		ctx:     ctx,
		stop:    stop,
	}
}

// SetReady tells what Info answers: the time from the kernel's start to the
// link being ready, and the part of it spent in the agent.
func (s *Service) SetReady(boot, init time.Duration) {
	s.boot.Store(int64(boot))
	s.init.Store(int64(init))
}

// Close thaws what is frozen and waits for what the service has begun, except
// for a sync or freeze that the kernel does not end.
func (s *Service) Close() error {
	s.stop()
	err := s.freezer.close()
	s.work.Wait()
	return err
}

// Info says who the agent is.
func (s *Service) Info(context.Context, *connect.Request[guestv1.InfoRequest]) (*connect.Response[guestv1.InfoResponse], error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, connect.NewError(connect.CodeInternal, fmt.Errorf("uname: %w", err))
	}
	return connect.NewResponse(&guestv1.InfoResponse{
		Version:       s.opt.Version,
		Protocol:      Protocol,
		KernelRelease: unix.ByteSliceToString(u.Release[:]),
		InitMode:      s.opt.InitMode,
		BootNs:        s.boot.Load(),
		InitNs:        s.init.Load(),
		Configured:    s.opt.Store.Current().Configured,
	}), nil
}

// Quiesce syncs the root file system and freezes it when asked. Freezing again
// what is frozen sets the time until it thaws by itself anew.
func (s *Service) Quiesce(ctx context.Context, req *connect.Request[guestv1.QuiesceRequest]) (*connect.Response[guestv1.QuiesceResponse], error) {
	limit := time.Duration(req.Msg.GetTimeoutMs()) * time.Millisecond
	switch {
	case limit == 0:
		limit = defaultFreeze
	case limit > maxFreeze:
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("timeout_ms: more than %d", maxFreeze.Milliseconds()))
	}
	if err := s.freezer.quiesce(ctx, req.Msg.GetFreeze(), limit); err != nil {
		return nil, callError(err)
	}
	return connect.NewResponse(&guestv1.QuiesceResponse{Frozen: req.Msg.GetFreeze()}), nil
}

// Thaw ends a freeze and tells whether it had held until now.
func (s *Service) Thaw(ctx context.Context, _ *connect.Request[guestv1.ThawRequest]) (*connect.Response[guestv1.ThawResponse], error) {
	was, err := s.freezer.thaw(ctx)
	if err != nil {
		return nil, callError(err)
	}
	return connect.NewResponse(&guestv1.ThawResponse{WasFrozen: was}), nil
}

// Stats measures the guest.
func (s *Service) Stats(context.Context, *connect.Request[guestv1.StatsRequest]) (*connect.Response[guestv1.StatsResponse], error) {
	st, err := s.stats()
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	return connect.NewResponse(st), nil
}

// ResizeDisk grows the root file system to its block device.
func (s *Service) ResizeDisk(ctx context.Context, _ *connect.Request[guestv1.ResizeDiskRequest]) (*connect.Response[guestv1.ResizeDiskResponse], error) {
	if err := s.begin(ctx); err != nil {
		return nil, err
	}
	defer s.end()
	n, err := s.sys.resize(s.opt.Root)
	if err != nil {
		return nil, callError(err)
	}
	return connect.NewResponse(&guestv1.ResizeDiskResponse{SizeBytes: n}), nil
}

// Shutdown answers and then powers the machine off.
func (s *Service) Shutdown(ctx context.Context, req *connect.Request[guestv1.ShutdownRequest]) (*connect.Response[guestv1.ShutdownResponse], error) {
	grace := time.Duration(req.Msg.GetGraceMs()) * time.Millisecond
	switch {
	case grace == 0:
		grace = defaultGrace
	case grace > maxGrace:
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("grace_ms: more than %d", maxGrace.Milliseconds()))
	}
	if s.opt.PowerOff == nil {
		return nil, connect.NewError(connect.CodeUnimplemented, errors.New("this agent cannot power off"))
	}
	if s.off.Swap(true) {
		return connect.NewResponse(&guestv1.ShutdownResponse{}), nil
	}
	s.work.Go(func() {
		// The request's context ends when its handler has returned.
		flush := time.NewTimer(time.Second)
		defer flush.Stop()
		select {
		case <-ctx.Done():
		case <-flush.C:
		}
		flush.Reset(answerFlush)
		select {
		case <-flush.C:
		case <-s.ctx.Done():
			return
		}
		if err := s.freezer.close(); err != nil {
			s.opt.Log.Error("thaw before power-off", "err", err)
		}
		if err := s.opt.PowerOff(s.ctx, grace); err != nil {
			s.opt.Log.Error("power off", "err", err)
			s.off.Store(false)
		}
	})
	return connect.NewResponse(&guestv1.ShutdownResponse{}), nil
}

// begin waits for the turn to change the machine.
func (s *Service) begin(ctx context.Context) error {
	select {
	case s.turn <- struct{}{}:
	case <-ctx.Done():
		return callError(ctx.Err())
	}
	if s.freezer.frozen() {
		s.end()
		return connect.NewError(connect.CodeFailedPrecondition, errors.New("the root file system is frozen: thaw it first"))
	}
	return nil
}

func (s *Service) end() { <-s.turn }

// callError gives an error its Connect code.
func callError(err error) error {
	code := connect.CodeInternal
	switch {
	case errors.Is(err, context.Canceled):
		code = connect.CodeCanceled
	case errors.Is(err, context.DeadlineExceeded):
		code = connect.CodeDeadlineExceeded
	case errors.Is(err, errUnsuitable):
		code = connect.CodeFailedPrecondition
	}
	return connect.NewError(code, err)
}

// errUnsuitable says that the guest is not as the call needs it.
var errUnsuitable = errors.New("not possible in this guest")
