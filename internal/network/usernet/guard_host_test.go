//go:build host

package usernet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/cmdrun"
	"github.com/agentiso/agentiso/internal/domain"
)

// sendEnv tells a re-executed test binary what to send a datagram to.
const sendEnv = "AGENTISO_TEST_SEND_TO"

func TestMain(m *testing.M) {
	if to := os.Getenv(sendEnv); to != "" {
		os.Exit(send(to))
	}
	os.Exit(m.Run())
}

// send exits 0 if the kernel takes a datagram for to, 3 if a rule forbids it.
func send(to string) int {
	c, err := net.Dial("udp", to)
	if err == nil {
		_, err = c.Write([]byte("x"))
	}
	switch {
	case err == nil:
		return 0
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES), errors.Is(err, unix.EHOSTUNREACH):
		return 3
	}
	fmt.Fprintln(os.Stderr, err)
	return 4
}

// TestGuard writes the table in a network namespace of its own and has a
// machine's user and another one send to both sides of each rule.
func TestGuard(t *testing.T) {
	for _, tool := range []string{"nft", "ip"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("missing capability: %s", tool)
		}
	}
	runtime.LockOSThread() // never unlocked: the thread dies with its namespace
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("missing capability: network namespaces (%v)", err)
	}
	for _, c := range []string{
		"ip link set lo up",
		"ip link add d0 type bridge", "ip link set d0 up",
		"ip addr add 198.51.100.7/24 dev d0", "ip route add default dev d0",
		"ip -6 addr add 2001:db8::7/64 dev d0 nodad", "ip -6 route add default dev d0",
	} {
		if _, err := cmdrun.Host(t.Context(), strings.Fields(c)...); err != nil {
			t.Skipf("missing capability: bridge interfaces (%v)", err)
		}
	}
	resolv := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(resolv, []byte("nameserver 127.0.0.53\nnameserver 10.1.1.1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := New(Options{
		UIDBase: 1_900_000_000, UIDCount: 10, ResolvConf: resolv,
		AllowPrivate: []netip.Prefix{netip.MustParsePrefix("192.168.5.0/24")},
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // it replaces itself
		if _, err := d.Attach(t.Context(), "w1", domain.NetworkPolicy{AllowInternet: true}, domain.NetworkSlot{}); err != nil {
			t.Skipf("missing capability: nftables (%v)", err)
		}
	}
	// The re-executed binary must be readable for other users.
	bin := filepath.Join("/tmp", fmt.Sprintf("usernet-test-%d", os.Getpid()))
	if _, err := cmdrun.Host(t.Context(), "cp", os.Args[0], bin); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(bin) })
	allowed := func(uid uint32, to string) bool {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), bin)
		cmd.Env = []string{sendEnv + "=" + to}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		if ee, ok := errors.AsType[*exec.ExitError](err); ok && ee.ExitCode() == 3 {
			return false
		}
		if err != nil {
			t.Fatalf("send to %s as %d: %v: %s", to, uid, err, out)
		}
		return true
	}
	for _, tt := range []struct {
		to   string
		want bool
	}{
		{"8.8.8.8:443", true}, {"[2606:4700::1111]:443", true},
		{"127.0.0.1:22", false}, {"127.0.0.53:80", false}, {"[::1]:22", false},
		{"198.51.100.7:22", false},    // the host's own public address
		{"[2001:db8::7]:22", false},   //
		{"10.1.2.3:80", false},        //
		{"172.31.0.1:80", false},      //
		{"192.168.4.1:80", false},     //
		{"169.254.169.254:80", false}, // metadata
		{"[fe80::1%d0]:80", false},    //
		{"[fd00::1]:80", false},       //
		{"239.1.1.1:1900", false},     //
		{"127.0.0.53:53", true},       // resolvers, for name service only
		{"10.1.1.1:53", true},         //
		{"10.1.1.1:80", false},        //
		{"192.168.5.9:80", true},      // allowed by configuration
	} {
		for _, uid := range []uint32{1_900_000_000, 1_900_000_009} {
			if got := allowed(uid, tt.to); got != tt.want {
				t.Errorf("machine %d to %s: allowed %v, want %v", uid, tt.to, got, tt.want)
			}
		}
		if !allowed(1_900_000_010, tt.to) {
			t.Errorf("another user is kept from %s", tt.to)
		}
	}
	for range 2 {
		if err := d.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if !allowed(1_900_000_000, "127.0.0.1:22") {
		t.Error("the table is still there after Remove")
	}
}
